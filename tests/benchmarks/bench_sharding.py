"""Sharding: what genpipe does to a photograph against what img2dataset does to it, and the whole stage.

    python tests/benchmarks/bench_sharding.py [--samples 400] [--rounds 7]

The peer is img2dataset's `Resizer` with its defaults: OpenCV decodes, INTER_AREA resizes, JPEG of quality 95 is
encoded; `resize_mode="no"` decodes and encodes too, where genpipe's `keep` looks at the header and hashes. Both hold
the files in memory. Needs `opencv-python-headless`. Expect, by CPU: 500 px to 64 at least 2 times as fast, to 256 at
least 1.1 times, pass-through at least 10 times.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from table import measure, show, single_thread

single_thread()

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import photos  # noqa: E402

from genpipe.data.images import CenterCrop, check_kept, encode, prepare, read_header  # noqa: E402
from genpipe.stages import shard  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    print(f"JPEGs of quality 90, {photos.describe()}")
    files = photos.photographs(options.samples, height=333, width=500)
    for size in (64, 256):
        contenders = {
            "genpipe": over(files, lambda data, size=size: square(data, size=size)),
            "img2dataset's operations": over(files, lambda data, size=size: img2dataset_square(data, size=size)),
        }
        show(f"500 x 333 px to {size} x {size}", measure(contenders, rounds=options.rounds), subject="genpipe")
    contenders = {"genpipe": over(files, keep), "img2dataset's operations": over(files, img2dataset_as_is)}
    show("500 x 333 px as they are", measure(contenders, rounds=options.rounds), subject="genpipe")
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(files):
            Path(folder, f"{number:05d}.jpg").write_bytes(data)
            Path(folder, f"{number:05d}.txt").write_text("a photograph of something or other")
        contenders = {f"genpipe {name}": stage(Path(folder), **block) for name, block in STAGES.items()}
        show("the whole stage: files to tars", measure(contenders, rounds=options.rounds), subject="genpipe to 64")


def over(files: list[bytes], work: Callable[[bytes], bytes]) -> Callable[[], int]:
    return lambda: sum(1 for data in files if work(data))


def square(data: bytes, *, size: int) -> bytes:
    return encode(prepare(read_header(data), resize=CenterCrop(), size=size), format="jpeg", quality=95)


def keep(data: bytes) -> bytes:
    check_kept(read_header(data))
    return data


def img2dataset_square(data: bytes, *, size: int) -> bytes:
    """`resize_mode="center_crop"`: albumentations' smallest_max_size and center_crop are these two lines of OpenCV."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    scale = size / min(image.shape[:2])
    sides = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    image = cv2.resize(image, sides, interpolation=cv2.INTER_AREA)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return jpeg(image[top : top + size, left : left + size])


def img2dataset_as_is(data: bytes) -> bytes:
    return jpeg(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))


def jpeg(image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [int(cv2.IMWRITE_JPEG_QUALITY), 95])[1])


STAGES: dict[str, dict[str, object]] = {
    "to 64": {"image_size": 64},
    "to 256": {"image_size": 256},
    "as they are": {"resize": {"kind": "keep"}},
    "to 64, duplicates looked for": {"filters": {"exact_duplicates": True, "near_duplicates": 4}},
}


def stage(folder: Path, **settings: object) -> Callable[[], int]:
    source = {"kind": "folder", "path": str(folder)}
    worker = shard.Worker(shard.Config.model_validate({"source": source, **settings}), {})

    def run() -> int:
        with tempfile.TemporaryDirectory() as out:
            return int(worker("00000", Path(out))["samples_in"])

    return run


if __name__ == "__main__":
    main()
