"""`genpipe init`: what it writes is a pipeline for the images that are there, and what it cannot use it names."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from genpipe.cli import init
from genpipe.pipeline.costs import cost_of
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import plan
from genpipe.stages import is_training

if TYPE_CHECKING:
    from conftest import Command


def source(path: Path) -> Any:
    cfg: Any = load_pipeline(str(path)).instances["shard"].cfg
    return cfg.source


def test_captions_beside_the_images(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine" / "pipeline.yaml"
    code, out, error = genpipe("init", str(path.parent), "--images", str(shapes), "--machine", "cpu")
    assert code == 0, error
    assert f"{path}: 60 images, drawn at 128 px" in out
    assert source(path).path == str(shapes) and source(path).label == ""
    pipeline = load_pipeline(str(path))
    assert pipeline.cfg.name == "mine" and pipeline.cfg.store == str(path.parent / "runs")
    commands = [line.split("  # ")[0].strip() for line in out.splitlines() if line.startswith("  genpipe ")]
    assert [command.split()[1] for command in commands] == ["plan", "run", "sample"]
    assert shlex.split(commands[2])[3] == "a large black bar", "the first image's caption"
    assert genpipe(*shlex.split(commands[0])[1:])[0] == 0


def test_names_of_folders_are_captions_where_there_are_no_others(
    genpipe: Command, shape_classes: Path, tmp_path: Path
) -> None:
    code, out, error = genpipe("init", str(tmp_path), "--images", str(shape_classes), "--machine", "cpu")
    assert code == 0 and "'a photo of a bar'" in out, error
    assert source(tmp_path / "pipeline.yaml").label == "folder"


def test_a_metadata_file(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    images = tmp_path / 'the "new" pictures: ü'
    images.mkdir()
    for name in ("small-red-bar.png", "large-red-bar.png"):
        (images / name).write_bytes((shapes / name).read_bytes())
    (images / "metadata.csv").write_text("file_name,text\nsmall-red-bar.png,it's one\n")
    code, out, error = genpipe("init", str(tmp_path / "mine"), "--images", str(images), "--machine", "gpu")
    assert code == 0 and shlex.split(out.splitlines()[-1])[3] == "it's one", error
    assert source(tmp_path / "mine/pipeline.yaml").path == str(images)


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
@pytest.mark.parametrize("size", ["128", "256", "512"])
def test_every_machine_and_size_is_a_pipeline_that_fits(
    genpipe: Command, shapes: Path, tmp_path: Path, machine: str, size: str
) -> None:
    """A GPU of 12 GB is enough, or two GiB of memory; the pictures have the size that was asked for."""
    arguments = ("--images", str(shapes), "--machine", machine, "--size", size)
    code, _, error = genpipe("init", str(tmp_path), *arguments)
    assert code == 0, error
    plans = {planned.name: planned for planned in plan(load_pipeline(str(tmp_path / "pipeline.yaml")))}
    assert plans["system"].artifact.meta["size"] == int(size)
    trained = [planned for planned in plans.values() if is_training(planned.instance.stage)]
    assert {planned.instance.cfg.resources.gpus for planned in trained} == {0.0 if machine == "cpu" else 1.0}
    peak = max(cost_of(p.instance.stage, p.instance.cfg, p.inputs).peak for p in trained)
    assert peak < (11 if machine == "gpu" else 2) * 2**30


def test_without_a_gpu_it_trains_as_the_demo_does(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    """So what is measured of the demo's time holds of it; captions of one's own may be longer."""
    code, _, error = genpipe("init", str(tmp_path), "--images", str(shapes), "--machine", "cpu")
    assert code == 0, error
    made, demo = (load_pipeline(str(path)) for path in (tmp_path / "pipeline.yaml", "configs/pipeline/demo.yaml"))
    trained = {name for name, instance in made.instances.items() if is_training(instance.stage)}
    assert trained == {"autoencoder", "clip", "prior", "decoder", "upsampler"}
    for name in trained | {"system"}:
        ours, theirs = (
            pipeline.instances[name].cfg.model_dump(exclude={"observe", "context_length"}) for pipeline in (made, demo)
        )
        assert ours == theirs


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--images: required"),
        (("--images", "absent"), "absent: there is no such folder"),
        (("--images", "empty"), "empty: no images in it"),
        (("--images", "."), "lies in the folder of images"),
        (("--images", "bare"), "no captions for the 1 images"),
        (("--images", "bare", "--captions", "folders"), "no image of"),
        (("--images", "bare", "--machine", "abacus"), "--machine"),
        (("--images", "bare", "--size", "100"), "--size"),
    ],
)
def test_each_mistake_is_named_and_nothing_written(
    genpipe: Command,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    named: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/one.png").write_bytes((shapes / "small-red-bar.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    code, _, error = genpipe("init", "mine", *arguments)
    assert code == 2 and named in error, error
    assert not (tmp_path / "mine" / "pipeline.yaml").exists()


def test_a_file_is_never_replaced(genpipe: Command, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("mine")
    code, _, error = genpipe("init", str(tmp_path), "--images", str(shapes))
    assert code == 2 and "is there already" in error
    assert (tmp_path / "pipeline.yaml").read_text() == "mine"


def test_a_person_is_asked_for_what_is_not_given(
    genpipe: Command, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found is the answer to a bare Enter."""
    typed = iter([str(shapes), "cpu", "", "256"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(init.typer, "prompt", lambda text, default="", **_: next(typed) or default)
    code, out, error = genpipe("init", str(tmp_path))
    assert code == 0 and "60 images, drawn at 256 px" in out, error
    assert next(typed, None) is None and source(tmp_path / "pipeline.yaml").label == ""


@pytest.mark.parametrize(("images", "share"), [(20, 0.2), (100, 0.16), (10_000, 0.05)])
def test_of_a_small_folder_a_larger_share_is_held_out(images: int, share: float) -> None:
    text = init._filled(Path("mine/pipeline.yaml"), images="x", count=images, captions="files", machine="cpu", size=128)
    assert f"heldout_fraction: {share} " in text
