"""The loop on real stages: exact resume, damaged checkpoints, numbers that stop being finite, losses that fall."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from folder_runtime import CPU, SGD_RATE, FolderRuntime, build, full_disk, sgd, train_stage, weights
from safetensors.torch import load_file
from small_objective import Small, stream, train_small

from genpipe.data.order import order
from genpipe.pipeline.spec import StageSpec
from genpipe.stage_config import Resources
from genpipe.stages import is_training, load_stage, stage_kinds
from genpipe.training import loop, state
from genpipe.training.loop import Interrupted
from genpipe.training.muon import orthogonalize
from genpipe.training.objective import Step
from genpipe.training.stream import seeded

if TYPE_CHECKING:
    from conftest import TinyPipeline

BATCH = 16
SHORT = (
    *("train.samples=128", f"train.global_batch_size={BATCH}", "train.micro_batch_size=8"),
    *("observe.log_every=1", "observe.validate_every=0"),
)
ADVERSARIAL = "stages.autoencoder.adversarial={start: 48, model: {width: 8, layers: 2}}"


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.set_float32_matmul_precision("highest")


def short(tiny: TinyPipeline, stage: str, *overrides: str) -> StageSpec:
    """Eight steps of a stage: the autoencoder with its discriminator from the fourth on, the prior with Muon."""
    special = {
        "autoencoder": (ADVERSARIAL,),
        "clip": ("stages.clip.train.micro_batch_size=null",),
        "prior": ("stages.prior.train.optim.kind=muon",),
    }
    settings = [f"stages.{stage}.{setting}" for setting in SHORT]
    return tiny.spec(stage, *settings, *special.get(stage, ()), *overrides)


TRAINED = ("autoencoder", "clip", "prior", "decoder", "upsampler", "pixel_decoder")


@pytest.fixture(params=TRAINED)
def spec(request: pytest.FixtureRequest) -> StageSpec:
    if request.param == "pixel_decoder":  # which is called decoder there
        return short(request.getfixturevalue("pixel_tiny"), "decoder")
    return short(request.getfixturevalue("tiny"), request.param)


def test_every_stage_that_trains_is_among_these() -> None:
    assert {kind for kind in stage_kinds() if is_training(load_stage(kind))} == set(TRAINED)


def steps_of(rt: FolderRuntime) -> dict[int, dict[str, float]]:
    """What training logged, without the clock's values."""
    clock = {"samples_per_second", "step_seconds", "data_wait_share", "other_share", "compute_share", "mfu"}
    clock |= {"peak_memory_gib", "checkpoint_interval_seconds", "checkpoint_stall_seconds"}
    return {at: {n: v for n, v in values.items() if n not in clock} for at, values in rt.logged.items()}


def test_an_interrupted_run_resumed_is_the_run_bitwise(spec: StageSpec, tmp_path: Path) -> None:
    straight = FolderRuntime(tmp_path / "straight")
    expected, result = train_stage(spec, straight)
    assert straight.saved() == [0], "checkpoints come by time; this run was too short for another"

    first = FolderRuntime(tmp_path / "cut", stop_at=5 * BATCH)
    with pytest.raises(Interrupted, match="stopped at 80 samples"):
        train_stage(spec, first)
    assert first.saved() == [0, 80]
    second = FolderRuntime(tmp_path / "cut")
    found, resumed = train_stage(spec, second)

    assert min(second.logged) == 96, "it went on after the checkpoint"
    assert steps_of(first) | steps_of(second) == steps_of(straight)
    assert resumed.metrics == result.metrics
    one, other = weights(expected), weights(found)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_discriminator_joins_late(tiny: TinyPipeline, tmp_path: Path) -> None:
    rt = FolderRuntime(tmp_path)
    train_stage(short(tiny, "autoencoder"), rt)
    assert [at for at, values in rt.logged.items() if "discriminator/loss" in values] == [64, 80, 96, 112, 128]
    assert all(values["autoencoder/adaptive_weight"] > 0 for at, values in rt.logged.items() if at >= 64)


def test_a_resumed_run_keeps_the_precision_that_it_began_with(
    tiny: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved to a machine where `auto` would decide otherwise."""
    spec = short(tiny, "decoder")
    monkeypatch.setattr(loop, "products_of", lambda precision, device: "bf16")
    straight = FolderRuntime(tmp_path / "straight")
    expected, _ = train_stage(spec, straight)
    with pytest.raises(Interrupted):
        train_stage(spec, FolderRuntime(tmp_path / "cut", stop_at=5 * BATCH))
    monkeypatch.setattr(loop, "products_of", lambda precision, device: "fp32")
    second = FolderRuntime(tmp_path / "cut")
    found, _ = train_stage(spec, second)
    assert straight.environment == second.environment == {"precision_used": "bf16"}
    one, other = weights(expected), weights(found)
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = FolderRuntime(tmp_path / "plain")
    unlike, _ = train_stage(spec, plain)
    assert plain.environment == {"precision_used": "fp32"}
    assert any(not torch.equal(one[name], tensor) for name, tensor in weights(unlike).items())


def test_a_module_may_have_its_own_optimizer_schedule_and_cadence(tiny: TinyPipeline, tmp_path: Path) -> None:
    own = "stages.autoencoder.train.trainable.discriminator={optim: {lr: 1e-4}, decay: constant, every: 3}"
    schedule = "stages.autoencoder.train={decay: linear, warmup_samples: 0, optim: {lr: 1e-3}}"
    rt = FolderRuntime(tmp_path / "own")
    train_stage(short(tiny, "autoencoder", schedule, own), rt)
    steps = sorted(rt.logged)
    assert [at for at in steps if "discriminator/loss" in rt.logged[at]] == [64, 112], "steps 3 and 6, counted from 0"
    assert all(rt.logged[at]["discriminator/lr"] == pytest.approx(1e-4) for at in (64, 112))
    rates = [rt.logged[at]["autoencoder/lr"] for at in steps]
    assert rates == pytest.approx([1e-3 * (1 - done / 128) for done in range(0, 128, BATCH)]), "linear, to 0"


def test_settings_of_a_module_that_is_not_trained_are_refused(tiny: TinyPipeline, tmp_path: Path) -> None:
    spec = short(tiny, "prior", "stages.prior.train.trainable.critic.every=2")
    with pytest.raises(ValueError, match=r"train\.trainable\.critic: .*it trains prior"):
        train_stage(spec, FolderRuntime(tmp_path))


@pytest.mark.parametrize(("stage", "clip"), [("autoencoder", 0.1), ("decoder", 0.1), ("decoder", None)])
def test_the_loop_is_gradient_descent(
    tiny: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, clip: float | None
) -> None:
    """Against the textbook: gradients of each module's own loss by its own weights alone, clipped and applied."""
    settings = ("samples=96", "micro_batch_size=16", "precision=fp32", "ema_decay=0", "decay=linear")
    settings += (f"grad_clip={'null' if clip is None else clip}",)
    spec = short(tiny, stage, *(f"stages.{stage}.train.{setting}" for setting in settings))
    monkeypatch.setattr(state, "build_optimizers", sgd)
    found, _ = train_stage(spec, FolderRuntime(tmp_path))

    objective, cfg = build(spec), load_stage(stage).Config.model_validate(spec.config)
    train = load_stage(stage).data(cfg, spec.inputs).train
    for seen in range(0, 96, BATCH):
        positions = np.arange(seen, seen + BATCH)
        batch = train.collate(order(positions, n=train.length, seed=cfg.train.seed), positions)
        for name in objective.active(seen):
            parameters = list(objective.trainable[name].parameters())
            loss, _ = objective.loss(name, batch, Step(seen, seeded(CPU, cfg.train.seed, name, seen)))
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            rate = SGD_RATE * (1 - seen / 96) * (min(1.0, clip / norm.item()) if clip else 1.0)
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    p -= rate * gradient
    expected = weights(objective)
    for name, tensor in weights(found).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_muon_multiplies_in_the_precision_of_the_training(tmp_path: Path) -> None:
    """One step by hand: bf16 is far off, and where it is not native a CPU spends most of its time on it."""
    found = train_small(
        stream(), FolderRuntime(tmp_path), steps=1, optim={"kind": "muon", "lr": 0.1, "weight_decay": 0}
    )
    objective = Small()
    batch = stream().train.collate(np.arange(4), np.arange(4))
    loss, _ = objective.loss("small", batch, Step(0, seeded(CPU, 0, "small", 0)))
    loss.backward()
    weight = objective.model.get_parameter("1.hidden.weight")
    assert weight.grad is not None
    update = orthogonalize(weight.grad[None], torch.float32)[0]
    torch.testing.assert_close(found["1.hidden.weight"], weight - 0.1 * 0.2 * 6**0.5 * update, atol=1e-5, rtol=0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(path: Path) -> None:
    """One bit, far from where a reader would notice."""
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, corrupt, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tiny: TinyPipeline, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    spec = short(tiny, "prior")
    expected, _ = train_stage(spec, FolderRuntime(tmp_path / "straight"))
    often = Resources(checkpoint_seconds=1e-9)
    first = FolderRuntime(tmp_path / "cut", stop_at=5 * BATCH)
    with pytest.raises(Interrupted):
        train_stage(spec, first, resources=often)
    before, last = first.saved()
    assert before < last == 80, "two are kept"
    damage(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1] / "rank-00000.safetensors")

    second = FolderRuntime(tmp_path / "cut")
    found, _ = train_stage(spec, second)
    assert min(second.logged) == before + BATCH, "it went on from the one before"
    [told] = second.events
    assert told.startswith("passed over a damaged checkpoint: ") and "rank-00000.safetensors" in told
    one, other = weights(expected), weights(found)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_without_its_manifest_is_none(tiny: TinyPipeline, tmp_path: Path) -> None:
    """Killed between the files and the manifest: the files alone are not a checkpoint."""
    spec = short(tiny, "prior")
    with pytest.raises(Interrupted):
        train_stage(spec, FolderRuntime(tmp_path, stop_at=2 * BATCH))
    *_, folder = sorted((tmp_path / "checkpoints").iterdir())
    (folder / "manifest.json").unlink()
    again = FolderRuntime(tmp_path)
    train_stage(spec, again)
    assert min(again.logged) == BATCH
    assert not folder.exists(), "what is left of it is deleted"


def test_numbers_that_are_not_finite_stop_training_unsaved(tiny: TinyPipeline, tmp_path: Path) -> None:
    """A rate at which the weights are useless after one step: training goes back once, and fails the second time."""
    settings = ("optim.lr=1e30", "precision=fp32", "guard={steps: 2, rollbacks: 1}")
    spec = short(tiny, "upsampler", *(f"stages.upsampler.train.{setting}" for setting in settings))
    rt = FolderRuntime(tmp_path)
    with pytest.raises(FloatingPointError) as error:
        train_stage(spec, rt, resources=Resources(checkpoint_seconds=1e-9))
    told = str(error.value)
    assert told.startswith("upsampler: the loss or a gradient is not finite after 96 samples, in 2 steps on end")
    assert "lower train.optim.lr" in told
    assert rt.environment["skipped_samples"].startswith("0-48 (upsampler: ")
    assert max(rt.saved()) < 96, "what was saved is from before"
    for file in tmp_path.glob("checkpoints/*/*.safetensors"):
        tensors = load_file(file)
        assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("trainable/upsampler/"))
        assert any(name.startswith("trainable/upsampler/") for name in tensors)


def test_a_stop_whose_checkpoint_cannot_be_written_says_where_a_new_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train_small(stream(), FolderRuntime(tmp_path, stop_at=16), steps=9, log_every=1)
    again = FolderRuntime(tmp_path, stop_at=24)
    with full_disk(), pytest.raises(Interrupted, match=r"goes on from .* as the checkpoint could not be") as stopped:
        train_small(stream(), again, steps=9, log_every=1)
    assert [stopped.value.samples_seen] == again.saved()[-1:]
    assert str(stopped.value).endswith("could not be written: [Errno 27] File too large")


def test_training_gives_up_where_no_checkpoint_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MOST_SECONDS", 0.0)
    rt = FolderRuntime(tmp_path)
    told = "last 3 checkpoints could not be written, the newest that could is that of 0 samples: .*too large"
    with full_disk(), pytest.raises(OSError, match=told):
        train_small(stream(), rt, steps=200, log_every=50, checkpoint_seconds=1e-9)
    assert len(rt.events) == 3


def test_validation_and_checkpoints_leave_training_as_it_is(tiny: TinyPipeline, tmp_path: Path) -> None:
    """Looking often must not change what is looked at."""
    quiet, busy = FolderRuntime(tmp_path / "quiet"), FolderRuntime(tmp_path / "busy")
    one, _ = train_stage(short(tiny, "decoder"), quiet)
    every = f"stages.decoder.observe.validate_every={BATCH}"
    other, _ = train_stage(short(tiny, "decoder", every), busy, resources=Resources(checkpoint_seconds=1e-9))
    assert sum("heldout/loss" in values for values in busy.logged.values()) == 8
    assert busy.pictures.count("samples") == 8
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_the_weights_left_in_place_are_the_average(tiny: TinyPipeline, tmp_path: Path) -> None:
    """With decay 0 the average is the last weights; with a long memory it is not."""
    left = {}
    for decay in (0.0, 0.9):
        override = f"stages.prior.train.ema_decay={decay}"
        objective, _ = train_stage(short(tiny, "prior", override), FolderRuntime(tmp_path / str(decay)))
        left[decay] = weights(objective)
    assert any(not torch.equal(left[0.0][name], left[0.9][name]) for name in left[0.0])


def test_metrics_are_means_over_the_steps_between(tiny: TinyPipeline, tmp_path: Path) -> None:
    """Logged every 4 steps or every one: the same numbers."""
    fine, coarse = FolderRuntime(tmp_path / "fine"), FolderRuntime(tmp_path / "coarse")
    train_stage(short(tiny, "prior"), fine)
    train_stage(short(tiny, "prior", "stages.prior.observe.log_every=4"), coarse)
    assert sorted(coarse.logged) == [64, 128]
    for name in ("prior/loss", "prior/grad_norm"):
        losses = [values[name] for _, values in sorted(fine.logged.items())]
        for half, at in ((losses[:4], 64), (losses[4:], 128)):
            assert coarse.logged[at][name] == pytest.approx(sum(half) / 4, rel=1e-5)


def test_logged_rates_are_what_the_clock_says(tiny: TinyPipeline, tmp_path: Path) -> None:
    rt = FolderRuntime(tmp_path)
    started = time.monotonic()
    train_stage(short(tiny, "upsampler"), rt)
    seconds = time.monotonic() - started
    assert 0 < sum(values["step_seconds"] for values in rt.logged.values()) <= seconds
    for values in rt.logged.values():
        if "step_seconds" in values:
            assert values["samples_per_second"] * values["step_seconds"] == pytest.approx(BATCH)
            assert 0 <= values["data_wait_share"] <= 1


@pytest.mark.parametrize(
    ("stage", "metric", "falls"),
    [
        ("autoencoder", "psnr", False),
        ("clip", "loss", True),
        ("prior", "loss", True),
        ("decoder", "loss", True),
        ("upsampler", "loss", True),
    ],
)
def test_training_improves_the_heldout_metric(
    tiny: TinyPipeline, tmp_path: Path, stage: str, metric: str, falls: bool
) -> None:
    """After 30 steps the fixed-noise held-out number is better than after one."""
    values = {}
    for samples in (BATCH, 30 * BATCH):
        settings = ("ema_decay=0.5", "warmup_samples=0", f"samples={samples}")
        quiet = f"stages.{stage}.observe.validate_every=0"
        spec = tiny.spec(stage, quiet, *(f"stages.{stage}.train.{setting}" for setting in settings))
        _, result = train_stage(spec, FolderRuntime(tmp_path / str(samples)))
        values[samples] = result.metrics[metric]
    assert (values[30 * BATCH] < values[BATCH]) == falls


def test_losses_fall_over_training(tiny: TinyPipeline, tmp_path: Path) -> None:
    for stage in ("autoencoder", "clip"):
        rt = FolderRuntime(tmp_path / stage)
        train_stage(tiny.spec(stage, f"stages.{stage}.observe.log_every=1"), rt)
        losses = [values[f"{stage}/loss"] for _, values in sorted(rt.logged.items())]
        assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("stage", ["clip", "decoder"])
def test_loader_processes_train_as_threads_do(tiny: TinyPipeline, tmp_path: Path, stage: str) -> None:
    """Images with captions, and cached features, collated in other processes: the same weights to the last bit."""
    override = () if stage == "decoder" else ("stages.clip.train.micro_batch_size=null",)
    spec = short(tiny, stage, *override)
    threads, _ = train_stage(spec, FolderRuntime(tmp_path / "threads"), resources=Resources(loader_threads=2))
    processes, _ = train_stage(spec, FolderRuntime(tmp_path / "processes"), resources=Resources(loader_processes=1))
    one, other = weights(threads), weights(processes)
    assert all(torch.equal(one[name], other[name]) for name in one)


def damaged_copy(spec: StageSpec, folder: Path, *, every: int) -> StageSpec:
    """The spec with other shards for input, in which every so many-eth training image has lost its first bytes."""
    shard = spec.inputs["shard"]
    shutil.copytree(shard.uri, folder)
    rows = 0
    for index in sorted(folder.glob("train-*.index.parquet")):
        tar = bytearray((tar_path := folder / index.name.replace(".index.parquet", ".tar")).read_bytes())
        for offset in pq.read_table(index)["offset"].to_pylist():
            if rows % every == 0:
                tar[offset : offset + 20] = bytes(20)
            rows += 1
        tar_path.write_bytes(bytes(tar))
    return spec.model_copy(update={"inputs": {"shard": shard.model_copy(update={"uri": str(folder)})}})


def test_damaged_samples_are_counted_and_written_down(tiny: TinyPipeline, tmp_path: Path) -> None:
    """One in ten images: training goes on with their neighbors, and says which they were."""
    whole = short(tiny, "upsampler", "stages.upsampler.train.max_bad_share=0.5")
    spec = damaged_copy(whole, tmp_path / "shards", every=10)
    first = FolderRuntime(tmp_path / "run", stop_at=64)
    with pytest.raises(Interrupted):
        train_stage(spec, first)
    second = FolderRuntime(tmp_path / "run")
    train_stage(spec, second)

    data = load_stage("upsampler").data(load_stage("upsampler").Config.model_validate(spec.config), spec.inputs)
    length = data.train.length
    for rt, start, stop in ((first, 0, 64), (second, 64, 128)):
        read = order(np.arange(start, stop), n=length, seed=0)
        expected = [int((read[: at - start] % 10 == 0).sum()) for at in sorted(rt.logged)]
        found = [values["bad_samples"] for _, values in sorted(rt.logged.items()) if "bad_samples" in values]
        assert found == expected and expected[-1] > 0
        (name,) = rt.files
        ledger = [json.loads(line) for line in rt.files[name].splitlines()]
        assert name == f"bad_samples-{start}.jsonl"
        assert len({row["key"] for row in ledger}) == len(ledger) == len({i for i in read.tolist() if i % 10 == 0})
        assert all(row["source"].startswith("train-") and row["reason"] == "not_an_image" for row in ledger)


def test_too_many_damaged_samples_stop_training(tiny: TinyPipeline, tmp_path: Path) -> None:
    spec = damaged_copy(short(tiny, "upsampler"), tmp_path / "shards", every=3)
    rt = FolderRuntime(tmp_path / "run")
    with pytest.raises(ValueError) as error:
        train_stage(spec, rt, resources=Resources(checkpoint_seconds=1e-9))
    told = str(error.value)
    assert "samples were damaged, such as " in told and "(not_an_image: " in told
    assert told.endswith(
        "see bad_samples-0.jsonl, run `genpipe data verify`, and restore the shards or take the samples out with "
        "`genpipe data remove`; train.max_bad_share is 0.01"
    )
    assert list(rt.files) == ["bad_samples-0.jsonl"]
    assert rt.saved(), "a few before all of the split was looked at"


def test_weights_of_sources_that_are_not_there(tiny: TinyPipeline, tmp_path: Path) -> None:
    spec = short(tiny, "upsampler", "stages.upsampler.train.source_weights={photos: 1}")
    with pytest.raises(ValueError, match=r"train.source_weights: no source is called 'photos'; the dataset's sources"):
        train_stage(spec, FolderRuntime(tmp_path))
