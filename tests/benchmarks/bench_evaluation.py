"""Retrieval against pools of captions of very different sizes: time and memory of one part, in a process of its own.

    python tests/benchmarks/bench_evaluation.py [--pools 300000 1000000] [--pictures 256]

Expect: the memory of the largest pool within 100 MiB of the smallest's, and a time that grows as the pool does. What is
counted is the process's own memory (RssAnon), before the part and what it takes more at its peak: the cache is mapped,
and its pages are the kernel's to drop.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

from table import single_thread

single_thread()
sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from gallery import SIDE, Gallery, evaluation, pictures  # noqa: E402

from genpipe.artifacts import Artifact  # noqa: E402
from genpipe.data.features import write_features  # noqa: E402
from genpipe.data.shards import INDEX_SCHEMA, INDEX_SUFFIX, write_table  # noqa: E402
from genpipe.evaluation.metrics.retrieval import RetrievalConfig  # noqa: E402
from genpipe.lineage import content_digest  # noqa: E402

WIDTH, SHARD = 512, 10_000
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=int, nargs="+", default=[300_000, 1_000_000])
    parser.add_argument("--pictures", type=int, default=256)
    options = parser.parse_args()
    print(f"{'pool':>12}{'pictures':>10}{'s a part':>10}{'MiB':>8}{'more':>8}")
    context = multiprocessing.get_context("spawn")
    for pool in options.pools:
        with tempfile.TemporaryDirectory() as folder:
            inputs = made(Gallery(Path(folder, "store")), pool=pool, count=options.pictures)
            results = context.Queue()
            process = context.Process(target=one_part, args=(inputs, Path(folder), options.pictures, results))
            process.start()
            seconds, before, peak = results.get()
            process.join()
        print(f"{pool:>12,}{options.pictures:>10}{seconds:>10.1f}{before / MIB:>8.0f}{(peak - before) / MIB:>8.0f}")


def made(gallery: Gallery, *, pool: int, count: int) -> dict[str, Artifact]:
    """Indexes and features of `pool` samples whose tars are empty, and pictures of some of their captions."""
    generator = np.random.default_rng(0)
    (shards := gallery.store / "pool-shards").mkdir(parents=True)
    (features := gallery.store / "pool-features").mkdir()
    for number, first in enumerate(range(0, pool, SHARD)):
        name, rows = f"train-{number:05d}-00", range(first, min(first + SHARD, pool))
        write_table(index(rows), shards / f"{name}{INDEX_SUFFIX}")
        with (shards / f"{name}.tar").open("wb") as tar:
            tar.truncate(1024)
        embeds = generator.standard_normal((2, len(rows), WIDTH)).astype(np.float16)
        embeds /= np.linalg.norm(embeds.astype(np.float32), axis=-1, keepdims=True)
        arrays = {
            "keys": np.asarray([f"s{i}" for i in rows]),
            "latents": np.zeros((len(rows), 1, 1, 1, 1), np.float16),
            "image_embeds": embeds[0][:, None],
            "text_embeds": embeds[1],
            "text_encodings": np.zeros((len(rows), 1), np.float16),
            "caption_offsets": np.arange(len(rows) + 1),
            "token_offsets": np.arange(len(rows) + 1),
        }
        write_features(features / name, arrays)
    shard, clip = gallery.commit("shards", shards), gallery.clip(dims=WIDTH)
    digests = {"shard": content_digest(shard), "clip": content_digest(clip)}
    lineage = {"shard": shard.fingerprint, "clip": clip.fingerprint}
    chosen = generator.choice(pool, count, replace=False).tolist()
    return {
        "shard": shard,
        "judge": clip,
        "judge_features": gallery.commit("features", features, made_from=digests, **lineage),
        "sample": gallery.shards({"train": pictures(range(count), [caption(i) for i in chosen])}, kind="samples"),
    }


def caption(i: int) -> str:
    """Of the length that captions of the web have."""
    return f"a photograph number {i} of something that somebody once saw somewhere"


def index(rows: range) -> pa.Table:
    """An index whose samples all lie at the same place of the tar, which is never read."""
    known = {
        "key": [f"s{i}" for i in rows],
        "group": [str(i) for i in rows],
        "captions": [[caption(i)] for i in rows],
        "offset": [512] * len(rows),
        "length": [1] * len(rows),
        "height": [SIDE] * len(rows),
        "width": [SIDE] * len(rows),
    }
    columns = [pa.array(known.get(field.name, [None] * len(rows)), field.type) for field in INDEX_SCHEMA]
    return pa.table(columns, schema=INDEX_SCHEMA)


def one_part(
    inputs: dict[str, Artifact], out: Path, count: int, results: multiprocessing.Queue[tuple[float, int, int]]
) -> None:
    """Seconds, and the most memory in bytes, of measuring all pictures as one part."""
    torch.set_num_threads(1)
    of, cfg = evaluation(inputs, part_size=count, batch_size=32), RetrievalConfig()
    [part] = cfg.parts(of)
    measure = cfg.measure(of)
    before = own_memory()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    measure(part, out)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    results.put((seconds, before, peak[0]))


def own_memory() -> int:
    """Bytes of this process that are of no file."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
