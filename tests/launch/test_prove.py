"""The proof of a bit-exact resume: it holds for stages that resume, and finds those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import yaml
from toybox import install

from genpipe.launch import prove as prove_module
from genpipe.launch.local import main as run_locally
from genpipe.launch.local import spec_of_stage
from genpipe.launch.prove import prove

if TYPE_CHECKING:
    from conftest import Command

FORGETFUL = """
from toys import toy_line
from toys.toy_line import *
from toys.toy_line import Config, HEADLINES, MAKES, VERSION, check_inputs, data, example_batch, export, roles

class Objective(toy_line.Objective):
    calls = 0

    def loss(self, name, batch, step):
        loss, metrics = super().loss(name, batch, step)
        self.calls += 1  # which no checkpoint holds
        return loss + self.calls * sum(p.sum() for p in self.model.parameters()), metrics

def objective(cfg, inputs, device):
    made = toy_line.objective(cfg, inputs, device)
    made.__class__ = Objective
    return made
"""
RESTLESS = "import time\n" + FORGETFUL.replace("self.calls *", "(time.time() % 1) *")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline with a stage that resumes, one that forgets something, and one that is another each time."""
    install()
    mine = tmp_path / "packages" / "mine"
    mine.mkdir(parents=True)
    (mine / "__init__.py").touch()
    (mine / "forgetful.py").write_text(FORGETFUL)
    (mine / "restless.py").write_text(RESTLESS)
    monkeypatch.syspath_prepend(mine.parent)
    train = {"samples": 80, "global_batch_size": 4, "precision": "fp32"}
    lines = {
        name: {"kind": kind, "inputs": {"toy_data": "points"}, "train": train}
        for name, kind in (("line", "toys.toy_line"), ("forgetful", "mine.forgetful"), ("restless", "mine.restless"))
    }
    stages = {"points": {"kind": "toys.toy_data", "parts": 2}, **lines}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "store": str(tmp_path / "store"), "stages": stages}))
    assert run_locally([str(path), "points", "tracking.uri=jsonl"]) == 0
    return str(path)


def files(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.timeout(900)  # for eight processes that load torch, one after the other
def test_two_ranks_that_resume(config: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    told: list[str] = []
    before = files(tmp_path / "store")
    spec = spec_of_stage(config, "line")
    proof = prove(spec, workers=2, steps=9, stop=3, scratch=scratch, tell=told.append)
    assert proof.difference is None and proof.repeatable
    assert (proof.stopped, proof.step) == (4, 10), "several ranks agree on a stop a step later"
    assert 4 <= proof.resumed <= 7
    assert len(told) == 4 and told[0] == "steps 1 to 9, straight through"
    assert proof.tensors > 4 and proof.nbytes > 0
    assert files(tmp_path / "store") == before, "the store is left as it was"
    assert not [p for p in psutil.Process().children(recursive=True) if "genpipe.launch.prove" in p.cmdline()]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["forgetful", "restless"])
def test_stages_that_do_not(config: str, genpipe: Command, tmp_path: Path, stage: str) -> None:
    """One that keeps a count outside of its modules; one that is another each time, which is no fault of resuming."""
    (tmp_path / "scratch").mkdir()
    code, out, err = genpipe(
        "prove", config, stage, "--steps", "9", "--at", "3", "--scratch", str(tmp_path / "scratch")
    )
    assert code == 1, err
    assert "the same to the last bit" not in out
    assert f"{stage}: trainable/line/bias is the first that differs: 1 of 1 elements, by " in err
    assert ("cannot be repeated" in err.replace("\n", " ")) == (stage == "restless")
    assert list((tmp_path / "scratch").iterdir()) == [], "nothing is left"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command(config: str, genpipe: Command) -> None:
    code, out, err = genpipe("prove", config, "line", "stages.line.train.samples=60")
    assert code == 0, err
    assert "steps 1 to 12, straight through\nsteps 1 to 4, then a stop with a checkpoint" in out
    assert "line: the same to the last bit" in out


def test_what_cannot_be_proved_is_said_at_once(config: str, genpipe: Command) -> None:
    for arguments, told in (
        (("points",), "stages.points: does not train"),
        (("line", "--steps", "19"), "the stage has only 20 in all"),
        (("line", "--at", "9"), "must be from 1 to 8"),
        (("line", "--workers", "3"), "3"),
    ):
        code, _, err = genpipe("prove", config, *arguments)
        assert code == 2 and told in err


def test_a_run_that_fails_shows_its_log(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_module.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="a rank of the proof ended with exit code 1"):
        prove(spec_of_stage(config, "line"), workers=1, steps=9, stop=3, scratch=tmp_path, tell=lambda _: None)
