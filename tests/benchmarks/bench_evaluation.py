"""Evaluation at the size of a million samples: the memory and the time of reading a pool and ranking prompts in it.

    python tests/benchmarks/bench_evaluation.py [--samples 1000000] [--prompts 64]

A cache is written with what retrieval reads of it: embeddings of 512 numbers in float16. The text encodings, which
would take 40 times as much, need not be there, as they are never opened. Expect the same memory,
within 100 MiB, whatever the number of samples: shards of 10,000 are mapped one at a time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from table import single_thread

single_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from genpipe.data.features import FeatureDataset, write_features  # noqa: E402
from genpipe.evaluation.retrieval import recall_at  # noqa: E402

WIDTH, SHARD, CHUNK = 512, 10_000, 2**14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    for samples in (options.samples // 10, options.samples):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), samples)
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # whose memory nothing else has used
                seconds, held, recall = pool.apply(rank, (Path(folder), options.prompts))
        print(
            f"{samples:>10,} samples: {seconds:6.2f} s, recall@10 {recall:.2f}, {held / 2**20:.0f} MiB with libraries"
        )


def write(folder: Path, samples: int) -> None:
    """Random unit vectors, row i of image embeddings near row i of text embeddings."""
    for number, first in enumerate(range(0, samples, SHARD)):
        count = min(SHARD, samples - first)
        random = np.random.default_rng(number)
        texts = random.normal(size=(count, WIDTH)).astype(np.float32)
        images = texts + 6 * random.normal(size=texts.shape).astype(np.float32)
        arrays = {
            "keys": np.char.add("photo-", np.arange(first, first + count).astype(str)),
            "image_embeds": unit(images)[:, None],
            "text_embeds": unit(texts),
            "caption_offsets": np.arange(count + 1),
        }
        write_features(folder / f"train-{number:05d}-00", arrays)


def unit(rows: np.ndarray) -> np.ndarray:
    """float16, of length 1."""
    normed: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normed.astype(np.float16)


def rank(folder: Path, prompts: int) -> tuple[float, int, float]:
    """Seconds to rank images of some samples among all captions, the most bytes that the process held, the recall."""
    torch.set_num_threads(1)
    dataset = FeatureDataset(folder, split="train")
    chosen = np.linspace(0, len(dataset) - 1, prompts).astype(np.int64)
    queries = dataset.image_embeds(chosen).float()
    began = time.perf_counter()
    own = (queries * dataset.text_embeds(chosen).float()).sum(1)
    ranks = sum((queries @ chunk.float().T > own[:, None]).sum(1) for chunk in pool(dataset))
    assert isinstance(ranks, torch.Tensor)
    return time.perf_counter() - began, peak(), recall_at(ranks, 10)


def pool(dataset: FeatureDataset) -> Iterator[torch.Tensor]:
    """The text embeddings of all first captions, [n, D]."""
    return dataset.chunks("text_embeds", size=CHUNK)


def peak() -> int:
    """Most bytes that this process has held so far, pages of mapped files included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
