"""The wheel: what is in it, and that it works where there is no checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import genpipe

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what it is made of: a build leaves folders in its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("genpipe", "flows"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    [made] = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked into an empty folder."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_module_and_what_they_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {path for folder in ("genpipe", "flows") for path in (ROOT / folder).rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in ours if "__pycache__" not in path.parts}
    configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    expected |= {f"genpipe/{path.relative_to(ROOT).as_posix()}" for path in configs}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == expected and {"genpipe/py.typed", "flows/py.typed"} <= packed


def test_its_metadata_have_the_license_and_the_version(site: Path) -> None:
    [info] = site.glob("*.dist-info")
    metadata = message_from_string((info / "METADATA").read_text())
    assert (metadata["Version"], metadata["License-Expression"]) == (genpipe.__version__, "Apache-2.0")
    assert (info / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_commands_work_where_there_is_no_checkout(site: Path, shapes: Path, tmp_path: Path) -> None:
    """From the wheel alone, not the checkout that the tests' environment may have installed.

    What a shipped pipeline makes goes into the working folder.
    """
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    environment.pop("GENPIPE_REVISION", None)

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "genpipe.cli.main", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import genpipe, flows; print(genpipe.__file__, flows.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(path.startswith(str(site)) for path in where.stdout.split())
    assert run("--version") == f"genpipe {genpipe.__version__}\n"
    assert "60 images" in run("init", "mine", "--images", str(shapes))
    assert "not made yet" in run("plan", "mine/pipeline.yaml")
    assert run("check", "mine/pipeline.yaml") == "mine/pipeline.yaml: ok\n"
    demo = run("plan", "configs/pipeline/demo.yaml")
    assert f"{tmp_path}/runs/demo/artifacts/decoder/" in demo and not (tmp_path / "configs").exists()


def test_the_version_is_written_down_once_and_cited_as_it_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (genpipe.__version__, project["license"])


def test_the_license_is_the_whole_of_apaches() -> None:
    """https://www.apache.org/licenses/LICENSE-2.0.txt, of which the owner's line alone is filled in."""
    ours = "Copyright 2026 The genpipe developers"
    text = (ROOT / "LICENSE").read_text()
    published = text.replace(ours, "Copyright [yyyy] [name of copyright owner]")
    assert ours in text
    digest = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256(published.encode()).hexdigest() == digest
