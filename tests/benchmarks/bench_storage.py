"""S3 at a distance: a data stage of many parts, and training on a feature cache by two processes of one node.

    python tests/benchmarks/bench_storage.py [--parts 5000] [--milliseconds 20] [--shards 20] [--steps 20 157]

A proxy delays the first byte of every answer of a real server (SeaweedFS). Expect 5,000 parts to start, resume and
commit in seconds each, and two processes to download what they read once and not twice.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
from slow_s3 import SPAWN, SlowS3, slow_s3  # noqa: E402

from genpipe import artifacts  # noqa: E402
from genpipe.artifacts import Artifact  # noqa: E402
from genpipe.data.features import write_features  # noqa: E402
from genpipe.data.loader import Batches, training_order  # noqa: E402
from genpipe.data.train_sets import cached_data  # noqa: E402
from genpipe.storage import at_once  # noqa: E402

T = TypeVar("T")
ROWS, BATCH, RANKS = 1000, 128, 2
ARRAYS = ("latents", "image_embeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=5000)
    parser.add_argument("--milliseconds", type=float, default=20)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--steps", type=int, nargs="*", default=[20, 157], help="none: only the stage of parts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, slow_s3(Path(folder), seconds=options.milliseconds / 1e3) as server:
        os.environ.update(server.environment())
        stage_of_parts(server, parts=options.parts)
        if options.steps:
            features = put_features(server, Path(folder), shards=options.shards)
            for steps in options.steps:
                train_on(server, Path(folder), features, steps=steps)


def measured(server: SlowS3, what: str, action: Callable[[], T]) -> T:
    """The action's result; prints its time, the requests and the bytes that came."""
    requests, received = server.passed()
    began, cpu = time.perf_counter(), time.process_time()
    result = action()
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    asked, came = (now - before for now, before in zip(server.passed(), (requests, received), strict=True))
    print(f"  {what:44}{took:8.2f} s{cpu:8.2f} s CPU{asked:8,} requests{came / 1e6:9.1f} MB", flush=True)
    return result


def stage_of_parts(server: SlowS3, *, parts: int) -> None:
    """What a data stage does with the store beside its work, in which each part brings a file and a marker.

    The driver has one file take the place of each `ROLL` markers while parts are made. It does so here with the last
    ones; for those before the file is put in place as it would be.
    """
    print(f"\n{parts:,} parts")
    names = [f"part-{number:05d}" for number in range(parts)]
    identity = artifacts.identity("parts", version=1, settings={}, inputs={})
    target = Artifact(kind="parts", uri="s3://genpipe/parts", fingerprint=artifacts.fingerprint(identity))
    files = {name: {"path": f"{name}.bin", "size": 1, "sha256": "0" * 64} for name in names}
    records = [{"part": name, "files": [files[name]], "stats": {"samples": 1}} for name in names]
    rolled = max(parts - artifacts.ROLL, 0) // artifacts.ROLL
    rolls = [records[number * artifacts.ROLL :][: artifacts.ROLL] for number in range(rolled)]
    half = rolled // 2

    def put_rolls(first: int, end: int) -> None:
        put(server, {f"{artifacts.ROLLS}{n:06d}.json": {r["part"]: r for r in rolls[n]} for n in range(first, end)})

    measured(server, "start: what is missing", lambda: artifacts.missing_parts(target.uri, names))
    put(server, {files[name]["path"]: 0 for name in names})
    put_rolls(0, half)
    missing = measured(server, "resume half-way: what is missing", lambda: artifacts.missing_parts(target.uri, names))
    assert missing == names[half * artifacts.ROLL :]
    put_rolls(half, rolled)
    put(server, {artifacts._marker(record["part"]): record for record in records[rolled * artifacts.ROLL :]})
    measured(server, "beside the work: the last markers", lambda: artifacts.finished_parts(target.uri))
    measured(server, "the end: what all parts say", lambda: artifacts.finished_parts(target.uri))
    rest: dict[str, Any] = {"config": {}, "inputs": {}, "metrics": {}}
    measured(server, "commit", lambda: artifacts.commit(target, parts=names, identity=identity, **rest))
    assert measured(server, "the next run finds it", lambda: artifacts.find(target.uri)) == target


def put(server: SlowS3, files: Mapping[str, Any]) -> None:
    """Files of JSON by the server's own API, past the proxy: it takes many small ones faster than S3's."""
    local = threading.local()

    def put_one(key: str) -> None:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection("127.0.0.1", server.server.filer_port)
        path = f"/buckets/genpipe/parts/{key}?saveInside={str(files[key] == 0).lower()}"
        local.connection.request("PUT", path, body=json.dumps(files[key]))
        answer = local.connection.getresponse()
        assert answer.status == 201, answer.read()
        answer.read()

    at_once(put_one, files, requests=8)


def put_features(server: SlowS3, folder: Path, *, shards: int) -> Artifact:
    """A committed cache of `shards` of 1,000 samples of 14 KB: latents and pooled embeddings of both sorts."""
    random = np.random.default_rng(0)
    for shard in range(shards):
        arrays = {
            "keys": np.asarray([f"{shard}-{row}" for row in range(ROWS)]),
            "latents": random.normal(size=(ROWS, 1, 4, 32, 32)).astype(np.float16),
            "image_embeds": random.normal(size=(ROWS, 1, 768)).astype(np.float16),
            "caption_offsets": np.arange(ROWS + 1),
            "text_embeds": random.normal(size=(ROWS, 768)).astype(np.float16),
            "token_offsets": 4 * np.arange(ROWS + 1),
            "text_encodings": random.normal(size=(4 * ROWS, 256)).astype(np.float16),
        }
        write_features(folder / "features" / f"train-{shard:05d}-00", arrays)
    write_features(folder / "features" / "heldout-00000-00", arrays)
    identity = artifacts.identity("features", version=1, settings={}, inputs={})
    sources = {"train": {"": [0, shards * ROWS]}, "heldout": {"": [0, ROWS]}}
    target = Artifact(
        kind="features",
        uri="s3://genpipe/features",
        fingerprint=artifacts.fingerprint(identity),
        meta={"sources": sources},
    )
    rest: dict[str, Any] = {"config": {}, "inputs": {}, "metrics": {}}
    return artifacts.commit(target, folder=folder / "features", identity=identity, **rest)


def train_on(server: SlowS3, folder: Path, features: Artifact, *, steps: int) -> None:
    """Two ranks of one node read their halves of as many batches, with nothing cached before."""
    manifest = artifacts.read_manifest(features.uri)
    assert manifest is not None
    size = sum(file.size for file in manifest.files)
    print(f"\n{steps} batches of {BATCH} by {RANKS} processes, of a cache of {size / 1e6:.0f} MB")
    os.environ["GENPIPE_CACHE"] = tempfile.mkdtemp(dir=folder)
    for what in ("nothing on the node", "again"):
        together = SPAWN.Barrier(RANKS + 1)
        ranks = [
            SPAWN.Process(target=read, args=(features.model_dump(), rank, steps, together)) for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        together.wait()
        measured(server, what, lambda: [rank.join() for rank in ranks])  # noqa: B023
        assert [rank.exitcode for rank in ranks] == [0] * RANKS


def read(features: dict[str, Any], rank: int, steps: int, together: Any) -> None:
    """What a rank reads."""
    together.wait()
    data = cached_data({"features": Artifact.model_validate(features)}, arrays=ARRAYS, seed=0)
    order = training_order(data, weights={}, seed=0, run=1)
    micro = BATCH // RANKS
    stream = Batches(
        data.train.collate,
        order=order,
        global_batch_size=BATCH,
        micro_batch_size=micro,
        rank=rank,
        world_size=RANKS,
        start=0,
        prefetch=8,
        threads=4,
    )
    for _, batch in islice(stream, steps):
        assert len(batch["latents"]) == micro


if __name__ == "__main__":
    main()
