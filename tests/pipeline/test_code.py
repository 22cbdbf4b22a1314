"""Which code runs a stage: its digest, and what is said where it is other than the planner's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toybox import TOYS, Toys

import genpipe
from genpipe import artifacts
from genpipe.launch.local import run_local
from genpipe.launch.rank import train_rank
from genpipe.launch.run_stage import PartWorker
from genpipe.pipeline.code import check_code, code_digest, packages_of

DIGEST = "from genpipe.pipeline.code import code_digest; print(code_digest('toys.toy_data'))"


def digest_in(folder: Path) -> str:
    """The digest that a process with the packages in `folder` comes to."""
    done = subprocess.run(
        [sys.executable, "-c", DIGEST], env={"PYTHONPATH": str(folder)}, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_digest_is_of_what_python_runs_wherever_it_lies(tmp_path: Path) -> None:
    Toys(tmp_path)  # makes the package known
    for name, folder in {"genpipe": Path(genpipe.__file__).parent, "toys": TOYS / "toys"}.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert packages_of("toys.toy_data").keys() == {"genpipe", "toys"} and packages_of("clip").keys() == {"genpipe"}
    same = digest_in(tmp_path)
    assert same == code_digest("toys.toy_data") != code_digest("clip")
    (tmp_path / "genpipe/notes.txt").write_text("no code")
    assert digest_in(tmp_path) == same
    for changed in ("genpipe/weights.py", "toys/toy_data.py"):
        file = tmp_path / changed
        before = file.read_text()
        file.write_text(before + "\n# edited\n")
        assert digest_in(tmp_path) != same
        file.write_text(before)
    (tmp_path / "genpipe/weights.py").rename(tmp_path / "genpipe/weight.py")
    assert digest_in(tmp_path) != same


def test_a_stage_runs_with_the_code_that_it_was_planned_with_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENPIPE_REVISION", "2222")
    toys = Toys(tmp_path)
    planned = {"version": "0.0.9", "git_revision": "1111-dirty"}
    other = toys.spec("toy_data").model_copy(update={**planned, "code": 64 * "0"})
    said = (
        rf"toy_data: planned with genpipe 0.0.9 at revision 1111-dirty .*runs genpipe {genpipe.__version__} at .* 2222"
    )
    with pytest.raises(ValueError, match=said):
        run_local(other)
    with pytest.raises(ValueError, match=said):
        PartWorker(other)
    line = toys.line(run_local(toys.spec("toy_data"))).model_copy(update={**planned, "code": 64 * "0"})
    with pytest.raises(ValueError, match=said.replace("toy_data", "toy_line")):
        train_rank(line, "", rank=0, world_size=1, device=None)  # type: ignore[arg-type]
    same = other.model_copy(update={"code": code_digest(other.stage), "target": toys.spec("toy_data", parts=2).target})
    check_code(same)


def test_the_manifest_and_the_records_name_the_code(tmp_path: Path) -> None:
    toys = Toys(tmp_path)
    toys.tracking_uri = "jsonl"
    known = {"version": genpipe.__version__, "git_revision": "1111", "code": code_digest("toys.toy_data")}
    spec = toys.spec("toy_data").model_copy(update=known)
    run_local(spec)
    assert artifacts.verify(spec.target.uri).environment.items() >= known.items()
    [records] = tmp_path.glob("runs/toy_data/*/metrics.jsonl")
    assert f'"code": "{known["code"]}"' in records.read_text()
