"""How much of the time an accelerator is busy in a data stage on Ray: the features stage with encoders that sleep.

    python tests/benchmarks/bench_accelerator.py [--side 256] [--parts 12] [--batches 4] [--seconds 0.1] [--rounds 3]

Expect at least 0.95 of the time from the first batch to the last, where the cores decode faster than the encoders
would encode. With one part at a time a worker does what it did before it could have several.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from table import single_thread  # noqa: E402

single_thread()

from bench_features import make_inputs, map_on_ray, spec_of  # noqa: E402
from bench_stream import BATCH  # noqa: E402
from benchmarks import asleep_stage as stage  # noqa: E402

from genpipe import artifacts  # noqa: E402
from genpipe.data.shard_dataset import open_shards  # noqa: E402

AT_ONCE = stage.Worker.parts_at_once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256, help="of the stored JPEGs, in pixels")
    parser.add_argument("--parts", type=int, default=12)
    parser.add_argument("--batches", type=int, default=4, help=f"of {BATCH} pictures, in a part; captions add as many")
    parser.add_argument("--seconds", type=float, default=0.1, help="that the encoders take for a batch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shares: dict[int, list[tuple[float, float]]] = {1: [], AT_ONCE: []}
    with tempfile.TemporaryDirectory() as folder:
        samples = options.parts * options.batches * BATCH
        inputs = make_inputs(Path(folder), samples=samples, side=options.side, parts=options.parts)
        shards = open_shards(inputs["shard"], split="train").shards()
        cfg = stage.Config(seconds=options.seconds, batch_size=BATCH)
        for number in range(options.rounds):
            for at_once, found in shares.items():
                spec = spec_of("benchmarks.asleep_stage", cfg, inputs, Path(folder, f"{at_once}-{number}"))
                stage.Worker.parts_at_once = at_once
                map_on_ray(spec, shards)
                found.append(busy(spec.target.uri, seconds=options.seconds))
    print(f"{options.parts} parts of {options.batches} x {BATCH} JPEGs of {options.side} px, "
          f"{options.seconds} s a batch: share of the time in which the accelerator is busy")  # fmt: skip
    for at_once, found in shares.items():
        asleep, late = zip(*found, strict=True)
        print(f"  {at_once} at a time: {median(asleep):.3f} [{min(asleep):.3f}-{max(asleep):.3f}], "
              f"of which {median(late):.3f} because the machine woke them up late")  # fmt: skip


def busy(uri: str, *, seconds: float) -> tuple[float, float]:
    """The share of the time from the first batch on that is slept, and that of it which the machine's load adds."""
    told = [record["stats"]["asleep"] for record in artifacts.finished_parts(uri).values()]
    asleep = max(told, key=len)
    whole, slept = asleep[-1][1] - asleep[0][0], sum(end - start for start, end in asleep)
    return slept / whole, (slept - len(asleep) * seconds) / whole


if __name__ == "__main__":
    main()
