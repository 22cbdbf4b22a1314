"""Both kinds of prior as a stage: what is fitted on the features, what is exported, and one scoreboard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import ConfigError
from genpipe.data.features import FeatureDataset
from genpipe.generation.conditions import Statistics, Text, embed_statistics
from genpipe.generation.embeds import sample_image_embeds, unconditional_image_embeds
from genpipe.stages import prior
from genpipe.training.objective import Step
from genpipe.training.stream import seeded
from genpipe.weights import load_weights

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
AUTOREGRESSIVE = "{kind: autoregressive, width: 32, depth: 1, heads: 2, buckets: 8, dot_buckets: 4}"
SCOREBOARD = {
    "loss", "cosine", "cosine_unrelated", "cosine_unconditional", "cosine_text", "cosine_text_sampled"
}  # fmt: skip
KINDS = {
    "diffusion": (),
    "autoregressive": (f"stages.prior.model={AUTOREGRESSIVE}",),
    "encoder's null": ("stages.prior.model.null_text=encoder",),
    "no tokens, encoder's null": ("stages.prior.model.text_tokens=false", "stages.prior.model.null_text=encoder"),
    "autoregressive, encoder's null": (
        f"stages.prior.model={AUTOREGRESSIVE}",
        "stages.prior.model.null_text=encoder",
    ),
}


def built(tiny: TinyPipeline, kind: str, *overrides: str) -> prior.Objective:
    spec = tiny.spec("prior", *KINDS[kind], *overrides)
    cfg = prior.Config.model_validate(spec.config)
    torch.manual_seed(cfg.train.seed)
    return prior.objective(cfg, spec.inputs, CPU)


@pytest.fixture(scope="module")
def features(tiny: TinyPipeline) -> FeatureDataset:
    return FeatureDataset(artifacts.fetch(tiny.run("features")), split="train")


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_report_one_scoreboard_and_export_what_they_trained(tiny: TinyPipeline, kind: str) -> None:
    made = tiny.run("prior", *KINDS[kind])
    metrics = artifacts.verify(made.uri).metrics
    assert metrics.keys() >= SCOREBOARD
    assert all(-1 <= value <= 1 for name, value in metrics.items() if name.startswith("cosine"))
    module, extra = load_weights(artifacts.fetch(made), kind="prior", device=CPU)
    assert module.state_dict().keys() == built(tiny, kind).model.state_dict().keys()
    assert extra["diffusion"]["predict"] == "x0"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "diffusion"])
def test_what_is_taken_from_the_features_is_the_same_each_time_and_for_every_seed(
    tiny: TinyPipeline, kind: str
) -> None:
    """Ranks and resumed runs build the objective anew: buffers must not depend on anything but the features."""
    one, again, other = (
        dict(built(tiny, kind, f"stages.prior.train.seed={n}").model.named_buffers()) for n in (0, 0, 1)
    )
    assert one and one.keys() == again.keys() == other.keys()
    assert all(torch.equal(one[name], again[name]) and torch.equal(one[name], other[name]) for name in one)
    assert all(buffer.any() for buffer in one.values() if len(buffer))


def test_the_fit_is_in_the_weights(tiny: TinyPipeline, features: FeatureDataset) -> None:
    made = tiny.run("prior", *KINDS["autoregressive"])
    module = load_weights(artifacts.fetch(made), kind="prior", device=CPU).module
    for name, buffer in built(tiny, "autoregressive").model.named_buffers():
        assert torch.equal(module.state_dict()[name], buffer)
    embeds = features.image_embeds(np.arange(len(features))).float()
    kept = F.cosine_similarity(module.codes.decode(module.codes.encode(embeds)), embeds)
    assert kept.mean() > 0.95


def test_codes_are_fitted_on_what_is_trained_on(tiny: TinyPipeline, features: FeatureDataset) -> None:
    """Of a mix: every source by its weight, wherever it lies."""
    weighted = "stages.prior.train.source_weights={early: 0, late: 1}"
    spec = tiny.spec("prior", *KINDS["autoregressive"], weighted)
    made = spec.inputs["features"]
    sources = {"train": {"early": [0, 20], "late": [20, len(features)]}, "heldout": made.meta["sources"]["heldout"]}
    mixed = {**spec.inputs, "features": made.model_copy(update={"meta": {**made.meta, "sources": sources}})}
    model = prior.objective(prior.Config.model_validate(spec.config), mixed, CPU).model
    late = features.image_embeds(np.arange(20, len(features))).double().mean(0)
    torch.testing.assert_close(model.codes.mean_D.double(), late, atol=1e-6, rtol=0)


def test_text_embeds_are_those_of_the_first_captions(features: FeatureDataset) -> None:
    rows = np.array([5, 0, 41, 5])
    assert torch.equal(features.text_embeds(rows), features.text(rows, np.zeros(4))["text_embeds"])


def test_the_encoders_null_caption_is_that_of_the_cache(tiny: TinyPipeline, features: FeatureDataset) -> None:
    model = built(tiny, "encoder's null").model
    null = features.null_text()
    assert torch.equal(model.null_encoding_W, null["text_encodings"].float())
    torch.testing.assert_close(model.null_text_D.norm(), torch.tensor(16.0**0.5), atol=1e-2, rtol=0)
    torch.testing.assert_close(F.normalize(model.null_text_D, dim=0), null["text_embeds"][0].float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_training_drops_the_text_and_nothing_else(tiny: TinyPipeline, features: FeatureDataset, kind: str) -> None:
    """With all captions given up the loss does not depend on them, and still depends on the image embeddings."""
    objective = built(tiny, kind)
    objective.cfg = objective.cfg.model_copy(update={"drop_text": 1.0})
    rows = np.arange(8)
    batch = {"image_embeds": features.image_embeds(rows), **features.text(rows, np.zeros(8))}

    def loss(**changes: Tensor) -> float:
        return objective.loss("prior", batch | changes, Step(0, seeded(CPU, "drop")))[0].item()

    other = {name: batch[name].flip(0) for name in ("text_embeds", "text_places")}
    assert loss(**other) == pytest.approx(loss(), rel=1e-6)
    assert loss(image_embeds=batch["image_embeds"].flip(1)) != pytest.approx(loss(), rel=1e-3)
    objective.cfg = objective.cfg.model_copy(update={"drop_text": 0.0})
    assert loss(**other) != pytest.approx(loss(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_takes_either_kind(tiny: TinyPipeline, features: FeatureDataset, kind: str) -> None:
    made = tiny.run("prior", *KINDS[kind])
    module: Any = load_weights(artifacts.fetch(made), kind="prior", device=CPU).module
    cfg = built(tiny, kind).cfg
    rows = np.arange(24)
    text = Text.from_cache(features.text(rows, np.zeros(24)))
    meta = tiny.run("features").meta

    def settings(**sampler: Any) -> dict[str, Any]:
        return {
            "statistics": embed_statistics(meta, CPU),
            "diffusion": cfg.diffusion,
            "sampler": cfg.observe.sampler.model_copy(update=sampler),
            "generator": seeded(CPU, 0),
        }

    def sampled(candidates: int, **sampler: Any) -> Tensor:
        return sample_image_embeds(module, text, candidates=candidates, **settings(**sampler))

    single, best = sampled(1), sampled(4)
    torch.testing.assert_close(single.norm(dim=-1), torch.ones(24))
    match_single, match_best = ((embeds * text.embed).sum(-1).mean() for embeds in (single, best))
    assert match_best > match_single
    assert torch.equal(sampled(2), sampled(2))
    assert not torch.equal(sampled(1, guidance_scale=3.0), single)
    others = Text(*(part.flip(0) for part in text))
    without, again = (unconditional_image_embeds(module, t, **settings()) for t in (text, others))
    torch.testing.assert_close(without, again)


def test_samples_leave_the_units_of_the_diffusion(tiny: TinyPipeline, features: FeatureDataset) -> None:
    """Embeddings that lie far out on one axis with little spread: so must the samples, whatever the network says."""
    far = Statistics(mean=100.0 * torch.eye(16)[3], std=torch.ones(16))
    objective, rows = built(tiny, "diffusion"), np.arange(4)
    settings: dict[str, Any] = {
        "statistics": far,
        "diffusion": objective.cfg.diffusion,
        "sampler": objective.cfg.observe.sampler,
        "generator": seeded(CPU, 0),
    }
    text = Text.from_cache(features.text(rows, np.zeros(4)))
    with torch.no_grad():
        sampled = sample_image_embeds(objective.model, text, candidates=2, **settings)
        without = unconditional_image_embeds(objective.model, text, **settings)
    for embeds in (sampled, without):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4))
        assert (embeds[:, 3] > 0.99).all()


def test_embeddings_may_be_scaled_instead_of_standardized(tiny: TinyPipeline, features: FeatureDataset) -> None:
    """As unCLIP's are, by 17.2 (appendix C): a unit vector of D numbers then has a deviation of 17.2 / sqrt(D)."""
    scaled = "stages.prior.embed_scale=17.2"
    objective, truth = built(tiny, "diffusion", scaled), features.image_embeds(np.arange(8)).float()
    torch.testing.assert_close(objective.statistics.standardize(truth), 17.2 * truth)
    assert objective.diffusion.sigma_data == pytest.approx(17.2 / 16**0.5)
    made = tiny.run("prior", scaled)
    assert made.meta["embed_scale"] == 17.2
    assert load_weights(artifacts.fetch(made), kind="prior", device=CPU).extra["diffusion"] == made.meta["diffusion"]
    tiny.run("features")
    with pytest.raises(ConfigError, match="embed_scale has no effect on a prior of kind autoregressive; remove it"):
        tiny.plan(scaled, *KINDS["autoregressive"])


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_an_example_is_a_batch(tiny: TinyPipeline, kind: str) -> None:
    """As collated, but for the length of the longest caption; and its loss is computed without any data."""
    spec = tiny.spec("prior", *KINDS[kind])
    cfg = prior.Config.model_validate(spec.config)
    real = prior.data(cfg, spec.inputs).train.collate(np.arange(6), np.arange(6))
    made = prior.example_batch(cfg, spec.inputs, batch_size=6)
    assert {name: x.dtype for name, x in made.items()} == {name: x.dtype for name, x in real.items()}
    tokens, longest = len(real["text_encodings"]), real["text_places"].shape[1]
    made["text_encodings"], made["text_places"] = made["text_encodings"][:tokens], made["text_places"][:, :longest]
    assert {name: x.shape for name, x in real.items()} == {name: x.shape for name, x in made.items()}
    meta = torch.device("meta")
    # All that is known before anything is trained.
    sizes = {"embed_dim": 16, "text_width": 32, "context_length": 16, "latent_channels": 4, "latent_size": 8}
    planned = {"features": Artifact(kind="features", uri="/nowhere", fingerprint="", meta=sizes)}
    objective = prior.objective(cfg, planned, meta)
    with meta:
        batch = prior.example_batch(cfg, planned, batch_size=6)
    loss, _ = objective.loss("prior", batch, Step(0, None))  # type: ignore[arg-type]  # meta has no generators
    loss.backward()
    assert all(p.grad is not None and p.grad.device == meta for p in objective.model.parameters())


def test_settings_that_cannot_be_are_refused(tiny: TinyPipeline) -> None:
    tiny.run("features")
    with pytest.raises(ConfigError, match=r"model\.text_positions 8 is less than CLIP's context_length 16; raise it"):
        tiny.plan("stages.prior.model.text_positions=8")
    with pytest.raises(ConfigError, match=r"diffusion\.variance 'learned': a prior predicts embeddings alone"):
        tiny.plan("stages.prior.diffusion={schedule: cosine, predict: x0, variance: learned}")
    with pytest.raises(ConfigError, match="width 32 is not divisible by heads 3"):
        tiny.plan("stages.prior.model={kind: autoregressive, width: 32, heads: 3}")
    with pytest.raises(ConfigError, match=r"stages\.prior\.model\.buckets: is a setting of another kind; set `kind`"):
        tiny.plan("stages.prior.model.buckets=8")
    with pytest.raises(ValueError, match=r"model\.buckets 1024 cannot be filled from 48 training samples; lower it"):
        built(tiny, "autoregressive", "stages.prior.model.buckets=1024")


def test_the_autoregressive_prior_beats_its_baselines(tiny: TinyPipeline) -> None:
    """Held-out embeddings: codes are likelier than chance, and samples nearer the truth than those without text are,
    or than another caption's truth is."""
    few = "{kind: autoregressive, width: 32, depth: 1, heads: 2, buckets: 4, dot_buckets: 2, variance: 0.8}"
    found = artifacts.verify(tiny.run("prior", f"stages.prior.model={few}").uri).metrics
    assert found["loss"] < 0.95 * np.log(4)
    assert found["cosine"] > max(found["cosine_unrelated"], found["cosine_unconditional"]) + 0.2
