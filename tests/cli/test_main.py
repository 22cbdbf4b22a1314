"""The command line as a user meets it: what it prints, and the exit code."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from pathlib import Path

import pytest
from conftest import Command

from flows.reporting import StageResult
from genpipe.artifacts import Artifact
from genpipe.cli import console
from genpipe.cli import main as cli

TINY = "configs/pipeline/tiny.yaml"


def settings(shapes: Path, store: Path) -> list[str]:
    return [f"stages.shard.source.path={shapes}", f"store={store}"]


def test_help_lists_the_commands(genpipe: Command) -> None:
    code, out, _ = genpipe("--help")
    assert code == 0
    assert all(name in out for name in ("run", "stage", "plan", "check", "sample", "ui", "doctor"))


def test_the_shipped_demo_is_valid(genpipe: Command) -> None:
    assert genpipe("check", "configs/pipeline/demo.yaml")[:2] == (0, "configs/pipeline/demo.yaml: ok\n")


def test_a_misspelt_key_is_one_message_without_a_trace(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    code, _, err = genpipe("plan", TINY, *settings(shapes, tmp_path), "stages.decoder.trian.samples=3")
    assert code == 2
    assert err == (
        "error: override 'stages.decoder.trian.samples=3': stages.decoder.trian: unknown key; did you mean 'train'?\n"
    )


def test_a_stage_that_is_not_there_is_named(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    code, _, err = genpipe("stage", "upsampler2", TINY, *settings(shapes, tmp_path))
    assert code == 2
    assert err == f"error: {TINY}: stages: no instance 'upsampler2'; did you mean 'upsampler'?\n"


@pytest.mark.parametrize("wrong", [("--mfu", "0"), ("--mfu", "nan"), ("--price", "-1"), ("--maximal", "1")])
def test_a_wrong_option_is_named(genpipe: Command, wrong: tuple[str, str]) -> None:
    code, _, err = genpipe("plan", TINY, *wrong)
    assert code == 2
    assert "Usage:" in err and wrong[0] in err and "--debug" not in err


def test_debug_shows_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["genpipe", "--debug", "check", "absent.yaml"])
    with pytest.raises(ValueError, match=r"absent\.yaml: no such configuration file"):
        cli.main()


def test_an_optimizer_setting_alone_keeps_the_default_optimizer(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    code, out, err = genpipe("plan", TINY, *settings(shapes, tmp_path), "stages.prior.train.optim.lr=1e-3")
    assert code == 0, err
    assert out.count("not made yet") == 10


def test_stages_that_disagree_are_named(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    code, _, err = genpipe("plan", TINY, *settings(shapes, tmp_path), "stages.autoencoder.image_size=64")
    assert code == 2
    assert "stages.autoencoder: image_size 64 is larger than the shards' 32 px" in err


def test_a_missing_folder_is_named(genpipe: Command) -> None:
    fault = f"stages.shard: source.path: the folder {Path('data/tiny').absolute()} does not exist"
    code, _, err = genpipe("stage", "shard", TINY)
    assert code == 2 and fault in err
    code, out, _ = genpipe("check", TINY)
    assert code == 0 and f"{TINY}: ok, but for its data: {TINY}: {fault}" in out, "it may be elsewhere"
    code, out, err = genpipe("plan", TINY)
    assert code == 0 and fault in err and "GiB a worker" in out


def test_a_stage_says_which_inputs_it_lacks(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    code, _, err = genpipe("stage", "prior", TINY, *settings(shapes, tmp_path))
    assert code == 2
    assert "features" in err and "is not committed for this configuration" in err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("tracking.uri=http://127.0.0.1:9", "tracking.uri: no MLflow at http://127.0.0.1:9"),
        ("ray.address=http://127.0.0.1:9", "ray.address: no Ray dashboard at http://127.0.0.1:9"),
    ],
)
def test_an_unreachable_service_is_named_with_its_setting(
    genpipe: Command, shapes: Path, tmp_path: Path, setting: str, said: str
) -> None:
    code, out, err = genpipe("run", TINY, *settings(shapes, tmp_path), setting)
    assert code == 2
    assert said in err and "Traceback" not in out + err


def test_doctor_tries_the_addresses_of_a_configuration(genpipe: Command) -> None:
    code, out, err = genpipe("doctor", TINY)
    assert code == 0, err
    assert "torch" in out and "CPU cores" in out and "MLflow" in out


def test_doctor_misses_the_demos_pictures_only_where_they_are_wanted(
    genpipe: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    demo = tmp_path / "demo.yaml"
    demo.write_text(f"base: {Path('configs/pipeline/demo.yaml').absolute()}\nstore: runs\n")
    version = importlib.metadata.version

    def without_resvg(name: str) -> str:
        if name == "resvg-py":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_resvg)
    code, out, err = genpipe("doctor", TINY)
    assert code == 0 and "no resvg-py; only the demo needs them" in out, err
    code, _, err = genpipe("doctor", str(demo))
    assert code == 1 and "demo's pictures: pip install 'genpipe[demo]'" in err


def test_a_table_on_a_pipe_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("reason", "detail"), [("corrupt", "x" * 3000), ("short", "y")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["corrupt", "x" * 3000] and len(lines) == 3


def test_a_run_ends_with_what_may_come_next(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    system = Artifact(
        kind="system", uri=str(tmp_path / "s"), fingerprint="f" * 64, meta={"conditioned_on": ["label", "text"]}
    )
    cli._next_steps(TINY, ["store=a place"], [StageResult("system", "cached", artifact=system)])
    seen, drawn = capsys.readouterr().out.splitlines()
    assert shlex.split(seen.partition(": ")[2])[1:] == ["ui", TINY, "store=a place"]
    command, source, *rest = shlex.split(drawn.partition(": ")[2])[1:]
    assert (command, Path(source).resolve()) == ("sample", tmp_path / "s")
    assert rest == ["--label", "NAME", "a prompt of your own", "--out", "drawn.png"]
