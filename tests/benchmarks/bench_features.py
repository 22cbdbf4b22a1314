"""The feature cache: reading it against `.npy` members of a WebDataset tar, and making it against a bare loop.

    python tests/benchmarks/bench_features.py [--samples 2000] [--rounds 7]

Expect, by CPU: latents at least 50 times as fast as from `.npy` members; caching through Ray Data at least 0.9 of the
rate of a loop that encodes the same arrays from memory with as many threads.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from table import measure, show, single_thread

single_thread()
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np  # noqa: E402
import photos  # noqa: E402
import torch  # noqa: E402
import webdataset as wds  # noqa: E402
from bench_stream import BATCH, write  # noqa: E402

from genpipe import artifacts  # noqa: E402
from genpipe.artifacts import Artifact  # noqa: E402
from genpipe.data.features import FeatureDataset, write_features  # noqa: E402
from genpipe.data.image_batches import image_batch  # noqa: E402
from genpipe.data.loader import Batches  # noqa: E402
from genpipe.data.order import order_of  # noqa: E402
from genpipe.data.shard_dataset import ShardDataset  # noqa: E402
from genpipe.data.tokenizer import train_tokenizer  # noqa: E402
from genpipe.generation.conditions import TOKENIZER_FILE  # noqa: E402
from genpipe.models.autoencoder import build_autoencoder  # noqa: E402
from genpipe.models.clip import CLIP, CLIPConfig  # noqa: E402
from genpipe.models.space_to_depth_autoencoder import FoldedConfig  # noqa: E402
from genpipe.pipeline.spec import StageSpec  # noqa: E402
from genpipe.stage_config import StageConfig  # noqa: E402
from genpipe.stages import features as stage  # noqa: E402
from genpipe.weights import save_weights  # noqa: E402

SIDE, TOKENS, CONTEXT = 64, 32, 77
PARTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    everything = ("latents", "image_embeds", "text_embeds", "text_encodings")
    for names, samples, full in (
        (("latents",), 8 * options.samples, False),
        (everything, options.samples, False),
        (everything, options.samples, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            reading(Path(folder), names, samples=samples // BATCH * BATCH, full=full, rounds=options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        caching(Path(folder), samples=options.samples, rounds=options.rounds)


def reading(folder: Path, names: tuple[str, ...], *, samples: int, full: bool, rounds: int) -> None:
    """The same arrays, float16, shuffled in batches from the cache and one after the other from a tar.

    Text encodings in the tar are padded to 77 tokens, as they leave an encoder, and in another tar cut to the caption;
    or all captions are `full`: of 77 tokens.
    """
    random = np.random.default_rng(0)
    spread = np.log(1 + (16 / 20) ** 2)  # tokens of a caption: 20 on average with a deviation of 16
    lengths = np.clip(random.lognormal(np.log(20) - spread / 2, spread**0.5, samples), 4, CONTEXT).astype(np.int64)
    if full:
        lengths[:] = CONTEXT
    offsets = np.cumsum([0, *lengths])
    arrays = {
        "latents": random.normal(size=(samples, 1, 4, 32, 32)).astype(np.float16),
        "image_embeds": random.normal(size=(samples, 1, 768)).astype(np.float16),
        "text_embeds": random.normal(size=(samples, 768)).astype(np.float16),
        "text_encodings": random.normal(size=(offsets[-1], 768)).astype(np.float16),
    }
    rest = {
        "keys": np.asarray([f"photo-{number}" for number in range(samples)]),
        "caption_offsets": np.arange(samples + 1),
        "token_offsets": offsets,
    }
    write_features(folder / "train-00000-00", {**arrays, **rest})

    def sample(number: int, *, padded: bool) -> dict[str, np.ndarray]:
        tokens = arrays["text_encodings"][offsets[number] : offsets[number + 1]]
        whole = np.pad(tokens, ((0, CONTEXT - len(tokens)), (0, 0))) if padded else tokens
        return {name: arrays[name][number] for name in names if name != "text_encodings"} | (
            {"text_encodings": whole} if "text_encodings" in names else {}
        )

    contenders = {"genpipe cache": cached(folder, names, samples=samples)}
    kinds = {"padded": True, "cut": False} if "text_encodings" in names and not full else {"": True}
    for kind, padded in kinds.items():
        tar = folder / f"members{kind}.tar"
        write_members(tar, (sample(number, padded=padded) for number in range(samples)))
        contenders[f".npy members of a WebDataset tar {kind and f'({kind})'}"] = members(tar, names)
    size = sum(file.stat().st_size for name in names for file in folder.rglob(f"{name}.npy")) // samples
    show(f"{' + '.join(names)}, {size:,} bytes a sample", measure(contenders, rounds=rounds), subject="genpipe cache")


def write_members(path: Path, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, arrays in enumerate(samples):
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                info = tarfile.TarInfo(f"photo-{number}.{name}.npy")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))


def cached(folder: Path, names: tuple[str, ...], *, samples: int) -> Callable[[], int]:
    dataset = FeatureDataset(folder, split="train")

    def collate(indices: np.ndarray, positions: np.ndarray) -> dict[str, torch.Tensor]:
        batch = {name: getattr(dataset, name)(indices) for name in names if not name.startswith("text")}
        return batch | (dataset.text(indices, np.zeros(len(indices))) if "text_encodings" in names else {})

    sizes = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "rank": 0, "world_size": 1, "start": 0}
    stream = Batches(collate, order=order_of({"": range(samples)}, weights={}, seed=0), prefetch=1, **sizes)

    def run() -> int:
        for _, batch in islice(stream, samples // BATCH):
            assert len(batch["latents"]) == BATCH and batch.keys() >= set(names)
        return samples

    return run


def members(tar: Path, names: tuple[str, ...]) -> Callable[[], int]:
    def run() -> int:
        dataset = wds.WebDataset(str(tar), shardshuffle=False).decode()
        return sum(1 for sample in dataset if all(sample[f"{name}.npy"].size for name in names))

    return run


def caching(folder: Path, *, samples: int, rounds: int) -> None:
    """The features stage on shards of photographs: in this process, on Ray Data, and what its encoders alone take."""
    inputs = make_inputs(folder, samples=samples // 8 * 8)
    cfg = stage.Config()
    worker = stage.Worker(cfg, inputs)
    dataset = ShardDataset(Path(inputs["shard"].uri), split="train")
    parts = dataset.shards()
    rows = [np.asarray(chunk) for part in parts for chunk in chunks(dataset.rows(part), cfg.batch_size)]
    arrays = [image_batch(dataset, chunk, size=SIDE).contiguous() for chunk in rows]
    captions = [[dataset.captions(int(i))[0] for i in chunk] for chunk in rows]
    outs = iter(range(10**9))

    def bare() -> int:
        with torch.no_grad():
            for images, texts in zip(arrays, captions, strict=True):
                worker._encoded([images, images])
                worker._text(worker._tokenized(texts))
        return len(dataset)

    def staged() -> int:
        for part in parts:
            worker(part, folder / f"out-{next(outs)}")
        return len(dataset)

    rates = measure({"features stage": staged, "bare loop, arrays in memory": bare}, rounds=max(2, rounds // 2))
    show(f"caching {SIDE} px", rates, subject="features stage")
    spec = spec_of("features", cfg, inputs, folder)
    map_on_ray(spec, parts)
    ends = [path.stat().st_mtime for path in Path(spec.target.uri, artifacts.PARTS).glob("*.json")]
    on_ray = (max(ends) - min(ends)) / (len(dataset) * (len(parts) - 1) / len(parts))
    alone = [rate.wall for rate in rates["bare loop, arrays in memory"]]
    shares = [seconds / 1e6 / on_ray for seconds in alone]
    print(f"  on Ray Data, one actor, from its first part to its last: {1e6 * on_ray:.1f} wall us a sample,")
    print(f"  {np.median(shares):.2f} [{min(shares):.2f}-{max(shares):.2f}] of the bare loop's rate")


def chunks(rows: range, size: int) -> list[range]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def spec_of(kind: str, cfg: StageConfig, inputs: Mapping[str, Artifact], folder: Path) -> StageSpec:
    """A stage like this one, to be made in a folder that holds nothing yet."""
    identity = artifacts.identity("features", version=stage.VERSION, settings={}, inputs=inputs)
    target = Artifact(kind="features", uri=str(folder / "target"), fingerprint=artifacts.fingerprint(identity))
    return StageSpec(
        name="features",
        stage=kind,
        config=cfg.model_dump(mode="json"),
        inputs=inputs,
        identity=identity,
        target=target,
        store=str(folder),
        tracking_uri="",
        experiment="",
    )


def map_on_ray(spec: StageSpec, parts: list[str]) -> None:
    """Make the parts with Ray Data on a Ray of two cores."""
    import ray

    from genpipe.launch.local_ray import TUNING
    from genpipe.launch.ray import RayLauncher

    os.environ.update(TUNING)
    ray.init(address="local", num_cpus=2, logging_level="error", log_to_driver=False)
    try:
        RayLauncher("bench").map(spec, parts)
    finally:
        ray.shutdown()


def make_inputs(folder: Path, *, samples: int, side: int = SIDE, parts: int = PARTS) -> Mapping[str, Artifact]:
    """Shards of photographs, and encoders of the demo's size with the weights that they start from."""
    shards = folder / "shard"
    shards.mkdir()
    write(shards, photos.photographs(samples, height=side, width=side), side=side, shards=parts)
    torch.manual_seed(0)
    autoencoder, clip = FoldedConfig(), CLIPConfig()
    tokenizer = train_tokenizer(["a photograph of something or other"], vocab_size=300)
    (folder / "autoencoder").mkdir()
    (folder / "clip").mkdir()
    save_weights(
        build_autoencoder(autoencoder),
        folder / "autoencoder",
        kind="autoencoder",
        config=autoencoder,
        sizes={},
        extra={},
    )
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": TOKENS, "eot_id": tokenizer.eot_id}
    save_weights(CLIP(clip, **sizes), folder / "clip", kind="clip", config=clip, sizes=sizes, extra={})
    tokenizer.save(folder / "clip" / TOKENIZER_FILE)
    channels = autoencoder.latent_channels
    metas = {
        "shard": {"image_size": side},
        "autoencoder": {"image_size": SIDE, "latent_mean": [0.0] * channels, "latent_std": [1.0] * channels},
        "clip": {"clip_image_size": clip.image_size, "context_length": TOKENS},
    }
    return {kind: committed(folder / kind, kind, meta) for kind, meta in metas.items()}


def committed(folder: Path, role: str, meta: dict[str, Any]) -> Artifact:
    """The folder as an artifact that fills a role."""
    kind = {"shard": "shards"}.get(role, role)
    identity = artifacts.identity(role, version=1, settings={}, inputs={}, source=str(folder))
    made = Artifact(kind=kind, uri=str(folder), fingerprint=artifacts.fingerprint(identity), meta=meta)
    return artifacts.commit(made, folder=folder, identity=identity, config={}, inputs={}, metrics={})


if __name__ == "__main__":
    main()
