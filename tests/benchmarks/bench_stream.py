"""Reading shards: genpipe against `webdataset` and against decoding alone, and a resume at sample 10 million.

    python tests/benchmarks/bench_stream.py [--samples 6000] [--rounds 7]

Expect, by CPU: at 64 px at least 4 times webdataset's `.decode("pil")`, at 256 px at least 1.7 times, and at least
0.85 of the rate of decoding alone into batches; the resume within a second.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from table import measure, show, single_thread

single_thread()

import numpy as np  # noqa: E402
import photos  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import simplejpeg  # noqa: E402
import webdataset as wds  # noqa: E402

from genpipe.data.image_batches import Images, empty_images  # noqa: E402
from genpipe.data.loader import Batches  # noqa: E402
from genpipe.data.order import order_of  # noqa: E402
from genpipe.data.shard_dataset import ShardDataset  # noqa: E402
from genpipe.data.shards import ShardWriter  # noqa: E402

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=6000, help="images at 64 px; a quarter as many at 256 px")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"JPEGs of quality 90, {photos.describe()}")
    for side, samples, sizes in ((64, options.samples, (64, 256)), (256, options.samples // 4, (64,))):
        with tempfile.TemporaryDirectory() as folder:
            images = photos.photographs(samples // max(sizes) * max(sizes), height=side, width=side)
            write(Path(folder), images, side=side)
            for size in sizes:
                contenders = {
                    "genpipe stream": stream(Path(folder), side=side, size=size),
                    'webdataset .decode("pil")': webdataset(Path(folder)),
                    "decoding alone, shuffled, into batches": decoding(images, side=side, size=size),
                    "decoding alone, in order, into one buffer": one_buffer(images, side=side),
                }
                title = f"{side} px in batches of {size}"
                show(title, measure(contenders, rounds=options.rounds), subject="genpipe stream")
    resume()


def write(folder: Path, images: list[bytes], *, side: int, shards: int = 4) -> None:
    """Shards of equal size, as the shard stage would write them."""
    largest = -(-len(images) // shards)
    with ShardWriter(folder, split="train", part=0, max_samples=largest, max_bytes=2**40) as writer:
        for number, image in enumerate(images):
            writer.write(
                f"photo-{number}",
                group=f"photo-{number}",
                image=image,
                format="jpeg",
                height=side,
                width=side,
                captions=["a photograph of something or other"],
                meta={},
            )


def stream(folder: Path, *, side: int, size: int) -> Callable[[], int]:
    """Shuffled batches as training takes them: order, read, decode, stack."""
    dataset = ShardDataset(folder, split="train")
    endless = batches(dataset, side=side, size=size)

    def run() -> int:
        for _, batch in islice(endless, len(dataset) // size):
            assert batch["images"].shape == (size, 3, side, side)
        return len(dataset)

    return run


def batches(dataset: ShardDataset, *, side: int, size: int) -> Batches:
    sizes = {"global_batch_size": size, "micro_batch_size": size}
    order = order_of(dataset.sources(), weights={}, seed=0)
    return Batches(Images(dataset, side), order=order, rank=0, world_size=1, start=0, prefetch=1, **sizes)


def webdataset(folder: Path) -> Callable[[], int]:
    """Its samples one after the other, unshuffled and unstacked."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))

    def run() -> int:
        return sum(1 for sample in wds.WebDataset(tars, shardshuffle=False).decode("pil") if sample["jpg"].size)

    return run


def decoding(images: list[bytes], *, side: int, size: int) -> Callable[[], int]:
    """What the stream cannot do without: the same shuffled images, from memory into batches as it makes them."""
    shuffled = np.random.default_rng(0).permutation(len(images)).reshape(-1, size).tolist()

    def run() -> int:
        for batch in shuffled:
            for number, image_HWC in zip(batch, empty_images(size, height=side, width=side), strict=True):
                simplejpeg.decode_jpeg(images[number], "RGB", buffer=image_HWC)
        return len(images)

    return run


def one_buffer(images: list[bytes], *, side: int) -> Callable[[], int]:
    """One after the other into one buffer that never leaves the nearest cache, placed as the stream places its own."""
    (buffer,) = empty_images(1, height=side, width=side)

    def run() -> int:
        return sum(1 for image in images if simplejpeg.decode_jpeg(image, "RGB", buffer=buffer).size)

    return run


def resume(*, shards: int = 10, rows: int = 1_000_000) -> None:
    """Open an index of ten million samples, of which the tars hold nothing, and place a batch after the first epoch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shard in range(shards):
            columns = {
                "key": pa.array(np.char.add("photo-", np.arange(shard * rows, (shard + 1) * rows).astype(str))),
                "captions": pa.array([["a photograph of something or other"]] * rows),
                "offset": pa.array(np.arange(rows) * 4096 + 512),
                "length": pa.array(np.full(rows, 3000)),
                "height": pa.array(np.full(rows, 64, np.int32)),
                "width": pa.array(np.full(rows, 64, np.int32)),
                "source": pa.array([""] * rows),
            }
            pq.write_table(pa.table(columns), folder / f"train-{shard:05d}-00.index.parquet")
            with (folder / f"train-{shard:05d}-00.tar").open("wb") as file:
                file.truncate((rows + 1) * 4096)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # whose memory nothing else has used
            opening, placing, held = pool.apply(place, (folder, shards * rows))
    print(f"\nresume in an index of {shards * rows:,} samples")
    print(f"  opening it takes {opening:.2f} s and {held / shards / rows:.0f} bytes a sample")
    print(f"  a batch's place at position {shards * rows:,}: {1e3 * placing:.1f} ms")


def place(folder: Path, position: int) -> tuple[float, float, int]:
    """Seconds to open an index and to find the samples of the batch at `position`, and the bytes that are then held."""
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    dataset = ShardDataset(folder, split="train")
    pa.default_memory_pool().release_unused()
    opened = time.perf_counter()
    samples = order_of(dataset.sources(), weights={}, seed=0)(np.arange(position, position + BATCH))
    dataset.stored_sizes(samples)
    return opened - began, time.perf_counter() - opened, psutil.Process().memory_info().rss - before


if __name__ == "__main__":
    main()
