"""Retrieval on committed pictures, against ranks counted by numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gallery import CPU, Gallery, measured, picture, pictures, unit

from genpipe.artifacts import Artifact, fetch
from genpipe.data.image_batches import to_float
from genpipe.evaluation.metrics.retrieval import RetrievalConfig
from genpipe.weights import load_weights

TRAIN, HELDOUT = 14, 5
CAPTIONS = [f"picture {i}" for i in range(TRAIN + HELDOUT)]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def clip(gallery: Gallery) -> Artifact:
    return gallery.clip()


def embed(clip: Artifact, seeds: list[int]) -> np.ndarray:
    """What CLIP says of pictures, float32 [N, D]."""
    module = load_weights(fetch(clip), kind="clip", device=CPU).module
    images = to_float(torch.from_numpy(np.stack([picture(seed) for seed in seeds])).permute(0, 3, 1, 2))
    with torch.no_grad():
        return module.encode_image(images).numpy()  # type: ignore[operator]


def reference(gallery: Gallery, clip: Artifact, captions: list[str], texts: np.ndarray) -> dict[str, Artifact]:
    """Pictures of the seeds 0, 1, ... with these captions, and CLIP's view of them with these text embeddings."""
    seeds = list(range(len(captions)))
    of = pictures(seeds, captions)
    shard = gallery.shards({"train": of[:TRAIN], "heldout": of[TRAIN:]}, name="|".join(captions))
    images = embed(clip, seeds)
    halves = {"train": (images[:TRAIN], texts[:TRAIN]), "heldout": (images[TRAIN:], texts[TRAIN:])}
    return {"shard": shard, "judge": clip, "judge_features": gallery.features(shard, clip, halves)}


def ranks(queries: np.ndarray, texts: np.ndarray, own: list[set[int]]) -> np.ndarray:
    """How many others are as similar as the most similar of each query's own, or more."""
    found = []
    for cosines, mine in zip(queries.astype(np.float64) @ texts.astype(np.float64).T, own, strict=True):
        best = max(cosines[i] for i in mine)
        found.append(sum(cosine >= best for i, cosine in enumerate(cosines) if i not in mine))
    return np.asarray(found)


def test_recalls_ceilings_and_cosines_by_numpy(gallery: Gallery, clip: Artifact, tmp_path: Path) -> None:
    texts = unit(TRAIN + HELDOUT, seed=1)
    inputs = reference(gallery, clip, CAPTIONS, texts)
    chosen = {"train": [3, 0, 7, 12, 9, 1, 13], "heldout": [2, 0, 4]}  # of each split
    drawn = {split: [100 + i for i in range(len(rows))] for split, rows in chosen.items()}
    own = {"train": chosen["train"], "heldout": [TRAIN + i for i in chosen["heldout"]]}
    inputs["sample"] = gallery.shards(
        {split: pictures(drawn[split], [CAPTIONS[i] for i in own[split]]) for split in ("train", "heldout")},  # type: ignore[misc]
        kind="samples",
        each=3,
    )
    found = measured(RetrievalConfig(recall_at=(1, 3)), inputs, tmp_path)
    for split, rows in own.items():
        real, made = embed(clip, rows), embed(clip, drawn[split])
        for name, queries in (("ceiling", real), ("recall", made)):
            expected = ranks(queries, texts, [{i} for i in rows])
            for k in (1, 3):
                assert found[f"{split}/{name}_at_{k}"] == pytest.approx((expected < k).mean())
        assert found[f"{split}/cosine"] == pytest.approx((real * made).sum(1).mean(), abs=1e-5)
        others = (real @ made.T)[~np.eye(len(rows), dtype=bool)]
        assert found[f"{split}/cosine_unrelated"] == pytest.approx(others.mean(), abs=1e-5)
        assert found[f"{split}/pictures"] == len(rows)
    assert found["pool"] == TRAIN + HELDOUT


def test_parts_and_chunks_change_nothing(
    gallery: Gallery, clip: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = reference(gallery, clip, CAPTIONS, unit(TRAIN + HELDOUT, seed=1))
    inputs["sample"] = gallery.shards({"train": pictures(range(50, 60), CAPTIONS[:10])}, kind="samples", name="parts")
    cfg = RetrievalConfig()
    whole = measured(cfg, inputs, tmp_path, part_size=100, batch_size=100)
    monkeypatch.setattr("genpipe.evaluation.metrics.retrieval.BLOCK", 20)
    assert measured(cfg, inputs, tmp_path, part_size=3) == pytest.approx(whole)
    assert not any(name.startswith("heldout/") for name in whole), "no pictures are of held-out captions"


def test_equal_captions_count_as_right(gallery: Gallery, clip: Artifact, tmp_path: Path) -> None:
    """A perfect model of class names: 'cat' belongs to every cat, whichever's embedding is nearest."""
    captions = ["cat" if i % 2 else "dog" for i in range(TRAIN + HELDOUT)]
    cat, dog = unit(1, seed=5), unit(1, seed=6)
    texts = np.concatenate([cat if caption == "cat" else dog for caption in captions])
    inputs = reference(gallery, clip, captions, texts)
    images = embed(clip, list(range(TRAIN + HELDOUT)))
    inputs["sample"] = gallery.shards({"train": pictures([0, 1], ["dog", "cat"])}, kind="samples", name="classes")
    found = measured(RetrievalConfig(recall_at=(1,)), inputs, tmp_path)
    right = [float(images[0] @ dog[0] > images[0] @ cat[0]), float(images[1] @ cat[0] > images[1] @ dog[0])]
    assert found["train/recall_at_1"] == np.mean(right)


def test_any_caption_of_a_sample_is_its_own(gallery: Gallery, clip: Artifact, tmp_path: Path) -> None:
    texts = unit(TRAIN + HELDOUT, seed=1)
    captions = [f"{caption}|{caption} again" for caption in CAPTIONS]
    inputs = reference(gallery, clip, captions, texts)
    inputs["sample"] = gallery.shards({"train": pictures([3, 4], ["picture 3", "picture 4 again"])}, kind="samples")
    found = measured(RetrievalConfig(), inputs, tmp_path)
    assert found["train/recall_at_1"] == found["train/ceiling_at_1"], "the pictures are the real ones"
    assert found["train/cosine"] == pytest.approx(1)


def test_a_prompt_that_is_no_caption_is_refused(gallery: Gallery, clip: Artifact, tmp_path: Path) -> None:
    inputs = reference(gallery, clip, CAPTIONS, unit(TRAIN + HELDOUT, seed=1))
    inputs["sample"] = gallery.shards({"train": pictures([0], ["a horse"])}, kind="samples", name="horse")
    with pytest.raises(ValueError, match=r"metrics\.retrieval: 1 of 1 prompts, the first 'a horse'.*role shard"):
        measured(RetrievalConfig(), inputs, tmp_path)


def by_itself(inputs: dict[str, Artifact]) -> dict[str, Artifact]:
    """The judge in the role of the CLIP that conditions the system."""
    named = {"judge": "clip", "judge_features": "features"}
    return {named.get(role, role): artifact for role, artifact in inputs.items()}


def test_a_clip_that_conditions_the_system_is_no_judge(gallery: Gallery, clip: Artifact, tmp_path: Path) -> None:
    """Neither by its fingerprint nor, under another name, by its content; it says of itself that it is none."""
    inputs = reference(gallery, clip, CAPTIONS, unit(TRAIN + HELDOUT, seed=1))
    of = {"train": pictures(range(50, 60), CAPTIONS[:10])}
    drawn = {"own": gallery.samples(of, clip), "other": gallery.samples(of, gallery.clip(dims=4, name="four"))}
    measured(RetrievalConfig(), inputs | {"sample": drawn["other"]}, tmp_path)
    circular = inputs | {"sample": drawn["own"]}
    planned = drawn["own"].model_copy(
        update={"uri": str(tmp_path / "nothing yet"), "meta": {"clips": [clip.fingerprint]}}
    )
    for given in (circular, circular | {"sample": planned}):
        with pytest.raises(ValueError, match=r"metrics\.retrieval: the judge .* was made with.* judge: self"):
            RetrievalConfig().check_inputs(given)
    renamed = gallery.clip(name="another")
    same = reference(gallery, renamed, CAPTIONS, unit(TRAIN + HELDOUT, seed=1)) | {"sample": drawn["own"]}
    RetrievalConfig().check_inputs(same)
    with pytest.raises(ValueError, match=r"metrics\.retrieval: the judge"):
        measured(RetrievalConfig(), same, tmp_path)
    cfg = RetrievalConfig(judge="self")
    found, judged = (
        measured(*of, tmp_path)
        for of in ((cfg, by_itself(circular)), (RetrievalConfig(), inputs | {"sample": drawn["other"]}))
    )
    counts = {"pool", "train/pictures"}
    assert found == {name if name in counts else name.replace("/", "/self_"): value for name, value in judged.items()}
    assert set(cfg.names(circular)) >= set(found)


def test_features_of_other_shards_are_refused(gallery: Gallery, clip: Artifact) -> None:
    inputs = reference(gallery, clip, CAPTIONS, unit(TRAIN + HELDOUT, seed=1))
    other = reference(gallery, clip, [*reversed(CAPTIONS)], unit(TRAIN + HELDOUT, seed=1))
    with pytest.raises(ValueError, match="features was made with shard"):
        RetrievalConfig().check_inputs({**inputs, "shard": other["shard"], "sample": other["shard"]})
