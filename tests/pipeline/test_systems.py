"""Which committed system is meant; what a pipeline's file stands for is in tests/cli/test_sample.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpipe.pipeline.systems import find_system

if TYPE_CHECKING:
    from conftest import TinyPipeline


@pytest.fixture
def store(tiny: TinyPipeline, tmp_path: Path) -> Path:
    """A moved store with one system."""
    system = Path(tiny.run("system").uri)
    copied = tmp_path / "moved"
    for folder in (Path(tiny.store) / "artifacts").iterdir():
        if folder.name != "system":
            shutil.copytree(folder, copied / "artifacts" / folder.name)
    shutil.copytree(system, copied / "artifacts/system" / system.name)
    return copied


def test_a_store_with_one_system_stands_for_it(tiny: TinyPipeline, store: Path) -> None:
    found = find_system(str(store))
    assert found.fingerprint == tiny.run("system").fingerprint
    assert found.uri.startswith(str(store)) and find_system(found.uri) == found


def test_of_several_systems_one_must_be_named(tiny: TinyPipeline, store: Path) -> None:
    other = Path(tiny.run("system", "stages.system.model.decoder.steps=3").uri)
    shutil.copytree(other, store / "artifacts/system" / other.name)
    with pytest.raises(ValueError, match=f"has 2 systems; .*\n(.*\n)?.*{other.name}"):
        find_system(str(store))
    (store / "artifacts/system" / other.name / "manifest.json").unlink()
    assert find_system(str(store)).uri.startswith(str(store)), "what is not committed is none"


def test_what_stands_for_no_system_is_told_apart(tiny: TinyPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind clip, not a system"):
        find_system(tiny.run("clip").uri)
    with pytest.raises(ValueError, match=f"{tmp_path}: neither a pipeline's YAML file, nor"):
        find_system(str(tmp_path))
    with pytest.raises(ValueError, match="only a pipeline's YAML file has systems by name"):
        find_system(tiny.run("system").uri, name="system")
