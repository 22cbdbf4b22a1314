"""The CLIP stage on the tiny pipeline: chunks, patch dropout, zero-shot labels, CLIP's own tokenizer."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from genpipe.artifacts import Artifact, fetch
from genpipe.data.image_batches import to_float
from genpipe.data.loader import Data
from genpipe.data.shard_dataset import open_shards
from genpipe.data.tokenizer import CLIP_EOT_ID, CaptionTokenizer
from genpipe.stages import clip
from genpipe.training.objective import Batch, Step
from genpipe.weights import load_weights

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
VOCABULARY = Path(metadata.distribution("open-clip-torch").locate_file("open_clip/bpe_simple_vocab_16e6.txt.gz"))
CLASSES = ("circle", "square", "triangle", "bar", "cross")


class Built:
    """The stage's parts for some settings, with the weights that seed 0 gives."""

    def __init__(self, tiny: TinyPipeline, *settings: str, device: torch.device = CPU) -> None:
        spec = tiny.spec("clip", *(f"stages.clip.{setting}" for setting in settings))
        self.inputs: dict[str, Artifact] = dict(spec.inputs)
        self.cfg = clip.Config.model_validate(spec.config)
        torch.manual_seed(0)
        self.objective = clip.objective(self.cfg, self.inputs, device)

    @property
    def data(self) -> Data:
        return clip.data(self.cfg, self.inputs)

    def step(self, batch: Batch, *, seed: int = 0) -> tuple[float, dict[str, Tensor], int]:
        """The loss, its gradients, and how many bytes were kept for backward."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = self.objective.loss("clip", batch, Step(0, torch.Generator().manual_seed(seed)))
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.objective.model.named_parameters() if p.grad is not None}
        self.objective.model.zero_grad()
        return loss.item(), gradients, sum(kept.values())


def train_batch(built: Built, size: int = 16) -> Batch:
    return built.data.train.collate(np.arange(size), np.arange(size))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "input", ["patch_dropout=0", "patch_dropout=0.5", "augmentation={least_area: 0.5, flip: true}"]
)
def test_chunks_of_the_towers_change_the_memory_alone(tiny: TinyPipeline, kind: str, input: str) -> None:
    settings = (f"model.loss={{kind: {kind}}}", input)
    whole, chunked = Built(tiny, *settings), Built(tiny, *settings, "tower_batch_size=3")
    batch = train_batch(whole)
    loss, gradients, kept = whole.step(batch)
    found, found_gradients, found_kept = chunked.step(batch)
    assert found == pytest.approx(loss, abs=1e-5)
    assert found_gradients.keys() == gradients.keys() == dict(whole.objective.model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-4)
    assert found_kept < kept / 20


def test_chunks_hold_under_bf16(tiny: TinyPipeline) -> None:
    whole, chunked = Built(tiny), Built(tiny, "tower_batch_size=5")
    batch = train_batch(whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (loss, gradients, _), (found, found_gradients, _) = whole.step(batch), chunked.step(batch)
    assert found == pytest.approx(loss, rel=1e-2)
    error, size = (
        torch.cat([tensor.flatten() for tensor in values]).norm().item()
        for values in ([found_gradients[name] - gradients[name] for name in gradients], gradients.values())
    )
    assert size > 0 and error < 0.02 * size


def test_patches_are_dropped_by_the_step_in_training_alone(tiny: TinyPipeline) -> None:
    every, some = Built(tiny), Built(tiny, "patch_dropout=0.5")
    batch = train_batch(some)
    losses = [some.step(batch, seed=seed)[0] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    seen: list[int] = []
    handle = some.objective.model.image_tower.blocks[0].register_forward_hook(
        lambda module, args, out: seen.append(out.shape[1])
    )
    some.step(batch)
    batches = [some.data.heldout.collate(np.arange(8), np.arange(8))]
    with torch.no_grad():
        metrics = [built.objective.validate(batches, torch.Generator()).metrics for built in (every, some)]
    handle.remove()
    assert seen == [8, 16], "half of the 16 patches in training, all of them in validation"
    assert metrics[0] == metrics[1]


def test_training_sees_views_of_its_images_and_validation_the_images(tiny: TinyPipeline) -> None:
    plain, mirrored = Built(tiny), Built(tiny, "augmentation.flip=true")
    batch, expected = train_batch(mirrored), train_batch(plain)
    assert "views" not in expected and 0 < batch["views"][:, 3].sum() < 16
    flipped = batch["views"][:, 3] == 1
    expected["images"][flipped] = expected["images"][flipped].flip(-1)
    assert mirrored.step(batch)[0] == pytest.approx(plain.step(expected)[0], abs=1e-5)
    heldout = [built.data.heldout.collate(np.arange(8), np.arange(8)) for built in (plain, mirrored)]
    assert heldout[0].keys() == heldout[1].keys() and torch.equal(heldout[0]["images"], heldout[1]["images"])


def test_a_perfect_model_of_class_names_retrieves_all(tiny: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture's embedding is that of its caption, which others have too, in batches padded to other lengths."""
    built = Built(tiny)
    tokenizer = CaptionTokenizer.load(fetch(tiny.run("clip")) / "tokenizer.json")
    names = ["a cat", "a dog", "a very small red circle"]
    embeds = nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    batches, classes = [], []
    for of_batch in ([0, 1, 0], [2, 1, 0]):
        tokens = tokenizer.encode_short([names[i] for i in of_batch], context_length=16)
        size = built.cfg.model.image_size
        images = torch.zeros(3, 3, size, size, dtype=torch.uint8)
        batches.append({"images": images, "tokens": torch.from_numpy(tokens)})
        classes.append(embeds[of_batch])
    assert batches[0]["tokens"].shape != batches[1]["tokens"].shape
    seen = iter(classes)
    monkeypatch.setattr(built.objective.model, "forward", lambda images, tokens: (own := next(seen), own))
    metrics = built.objective.validate(batches, torch.Generator()).metrics
    assert {metrics[f"{way}_r1"] for way in ("image_to_text", "text_to_image")} == {1.0}


def test_the_example_is_a_batch_as_collated_and_needs_no_data(tiny: TinyPipeline) -> None:
    built = Built(tiny)
    collated = train_batch(built, size=4)
    with torch.device("meta"):
        described = {"shard": built.inputs["shard"].model_copy(update={"uri": "nowhere"})}
        example = clip.example_batch(built.cfg, described, batch_size=4)
        objective = clip.objective(built.cfg, described, torch.device("meta"))
        loss, _ = objective.loss("clip", example, Step(0, torch.Generator()))
    assert loss.device.type == "meta" and loss.shape == ()
    assert {k: v.dtype for k, v in example.items()} == {k: v.dtype for k, v in collated.items()}
    assert example["images"].shape == collated["images"].shape
    assert example["tokens"].shape == (4, built.cfg.context_length)
    with_clips = built.cfg.model_copy(
        update={"tokenizer": clip.ClipVocabulary(kind="clip", vocabulary=Path("nowhere")), "context_length": 77}
    )
    assert clip.text_sizes(with_clips, None) == {"vocab_size": 49408, "context_length": 77, "eot_id": 49407}


def test_zero_shot_is_sklearns_accuracy_over_the_images_whose_caption_names_a_class(tiny: TinyPipeline) -> None:
    names = ", ".join(CLASSES[:4])
    built = Built(tiny, f"zero_shot={{classes: [{names}], templates: ['a small red {{}}', 'a large blue {{}}']}}")
    heldout = built.data.heldout
    rows = np.arange(heldout.length)
    batches = [heldout.collate(part, part) for part in np.array_split(rows, 3)]
    shards = open_shards(built.inputs["shard"], split="heldout")
    named = [shards.captions(int(i))[0].split()[-1] for i in rows]
    labels = torch.cat([batch["labels"] for batch in batches]).tolist()
    assert labels == [CLASSES.index(name) if name != "cross" else -1 for name in named]
    assert "labels" not in train_batch(built)
    model, tokenizer = built.objective.model, clip._tokenizer(built.cfg, built.inputs)

    def classes_of(template: str) -> Tensor:
        prompts = [template.format(name) for name in CLASSES[:4]]
        return model.encode_text(torch.from_numpy(tokenizer.encode_batch(prompts, context_length=16)))[0]

    with torch.no_grad():
        metrics = built.objective.validate(batches, torch.Generator()).metrics
        mean = (classes_of("a small red {}") + classes_of("a large blue {}")) / 2
        embeds = torch.cat([model.encode_image(to_float(batch["images"])) for batch in batches])
    kept = [i for i, label in enumerate(labels) if label >= 0]
    expected = top_k_accuracy_score(
        [labels[i] for i in kept],
        (embeds[kept] @ nn.functional.normalize(mean, dim=-1).T).numpy(),
        k=1,
        labels=range(4),
    )
    assert metrics["zero_shot_images"] == len(kept) < len(rows)
    assert metrics["zero_shot_top1"] == pytest.approx(expected)


def test_classes_that_no_caption_names_have_no_accuracy(tiny: TinyPipeline) -> None:
    built = Built(tiny, "zero_shot={classes: [aardvark, zebra]}")
    batches = [built.data.heldout.collate(np.arange(4), np.arange(4))]
    with torch.no_grad():
        metrics = built.objective.validate(batches, torch.Generator()).metrics
    assert metrics["zero_shot_images"] == 0 and "zero_shot_top1" not in metrics


def test_training_with_clips_own_tokenizer(tiny: TinyPipeline) -> None:
    settings = (f"tokenizer={{kind: clip, vocabulary: {VOCABULARY}}}", "train.samples=64", "observe.validate_every=0")
    artifact = tiny.run("clip", *(f"stages.clip.{setting}" for setting in settings))
    folder = fetch(artifact)
    tokenizer = CaptionTokenizer.load(folder / "tokenizer.json")
    model = load_weights(folder, kind="clip", device=CPU).module
    assert model.text_tower.tokens.num_embeddings == 49408 and model.text_tower.eot_id == CLIP_EOT_ID
    assert artifact.meta["tokenizer"] == tokenizer.digest
    tokens = torch.from_numpy(tokenizer.encode_batch(["a small red circle", "!"], context_length=16))
    assert model.text_mask(tokens).sum(1).tolist() == [6, 3], "the exclamation mark, id 0, is no padding"
