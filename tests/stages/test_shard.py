from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from pydantic import ValidationError
from shard_files import commit, configured, encoded, folder_of, jpeg, ledger, make, smooth, stored
from source_files import parquet, put, tar_of

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.data.images import SUFFIX, decode
from genpipe.data.shard_dataset import ShardDataset, open_shards
from genpipe.data.shards import check_shard, read_index
from genpipe.pipeline.spec import StageSpec
from genpipe.stages import shard


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty photographs with captions, and five files that cannot be used, each for its own reason."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(30):
        (folder / f"photo{number:02d}.jpg").write_bytes(jpeg(number))
        (folder / f"photo{number:02d}.txt").write_text(f"photo number {number}\nanother caption")
    for name, content in {
        "bad-empty": b"",
        "bad-html": b"<html>not found</html>",
        "bad-half": jpeg(99)[:800],
        "bad-uncaptioned": jpeg(98),
        "bad-bomb": jpeg(97),
    }.items():
        (folder / f"{name}.jpg").write_bytes(content)
        if name != "bad-uncaptioned":
            (folder / f"{name}.txt").write_text("caption")
    Image.new("1", (3000, 3000)).save(folder / "bad-bomb.jpg", "PNG")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.*"))
        if path.name != artifacts.MANIFEST
    }


def test_every_sample_is_in_a_shard_or_in_the_ledger(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = make(configured(photos), out)
    meta, metrics = manifest.artifact.meta, manifest.metrics
    assert {row["source"]: row["reason"] for row in ledger(out)} == {
        "bad-bomb.jpg": "too_large",
        "bad-empty.jpg": "empty",
        "bad-half.jpg": "truncated",
        "bad-html.jpg": "not_an_image",
        "bad-uncaptioned.jpg": "no_caption",
    }
    assert metrics["samples_in"] == 35 and metrics["rejected"] == 5
    assert metrics["samples_train"] + metrics["samples_heldout"] == 30
    assert metrics["captions"] == 60 and metrics["rejected_too_large"] == 1
    assert meta["image_size"] == 32 and meta["rejected"]["truncated"] == 1
    for split in ("train", "heldout"):
        dataset = ShardDataset(out, split=split)  # type: ignore[arg-type]
        assert len(dataset) == meta["samples"][split] and dataset.shards() == meta["shards"][split]
        for i in range(len(dataset)):
            assert dataset.image(i).shape == (32, 32, 3)
            assert dataset.captions(i) == [f"photo number {int(dataset.key(i)[5:])}", "another caption"]


def test_stored_images_are_the_centre_of_the_originals(photos: Path, tmp_path: Path) -> None:
    make(configured(photos, format="png"), tmp_path / "out")
    dataset = ShardDataset(tmp_path / "out", split="train")
    for i in range(len(dataset)):
        original = Image.open(photos / f"{dataset.key(i)}.jpg").crop((20, 0, 100, 80))
        reference = np.asarray(original.resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(dataset.image(i) - reference).mean() < 2


@pytest.mark.parametrize("format, suffix", [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_any_webdataset_reader_opens_the_shards(photos: Path, tmp_path: Path, format: str, suffix: str) -> None:
    out = tmp_path / "out"
    make(configured(photos, format=format), out)
    urls = [str(path) for path in sorted(out.glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    dataset = ShardDataset(out, split="train")
    assert [sample["__key__"] for sample in samples] == [dataset.key(i) for i in range(len(dataset))]
    for i, sample in enumerate(samples):
        assert np.abs(sample[suffix].astype(int) - dataset.image(i)).max() <= 4
        assert sample["txt"] == dataset.captions(i)[0] and sample["json"]["captions"] == dataset.captions(i)


def test_the_same_source_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(configured(photos, filters={"exact_duplicates": True, "near_duplicates": 4}), tmp_path / name)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_what_an_attempt_that_was_cut_off_left_is_not_read(photos: Path, tmp_path: Path, store_uri: str) -> None:
    """It had more samples (of URLs that have failed since), and so more shards; the next attempt replaces it."""
    cfg = configured(photos, part_size=100, max_shard_bytes=10_000, heldout_fraction=0.4)
    first = tmp_path / "first"
    first.mkdir()
    stats = shard.Worker(cfg, {})("00000", first)
    artifacts.add_part(store_uri, "00000", first, stats)
    for number in range(10, 30):
        (photos / f"photo{number}.jpg").write_bytes(b"")
    manifest = make(cfg, store_uri)
    assert len(manifest.artifact.meta["shards"]["train"]) < len(list(first.glob("train-*.tar")))
    assert list(artifacts.added_files(manifest, store_uri)) == []
    dataset = open_shards(manifest.artifact, split="train")
    assert len(dataset) == manifest.artifact.meta["samples"]["train"]
    assert dataset.shards() == manifest.artifact.meta["shards"]["train"]


def test_parts_and_digest_follow_the_source(photos: Path) -> None:
    cfg = configured(photos)
    assert shard.parts(cfg, {}) == ["00000", "00001", "00002"]
    before = shard.source_digest(cfg)
    (photos / "photo00.txt").write_text("changed caption of another length")
    assert shard.source_digest(cfg) != before
    assert shard.check_inputs(cfg, {}) == {
        "image_size": 32,
        "condition": False,
        "combinations": False,
        "classes": [],
    }


def test_groups_never_straddle_the_split(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for number in range(40):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        rows.append(json.dumps({"file_name": f"{number}.jpg", "text": "x", "group": f"subject {number % 8}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    make(configured(folder, heldout_fraction=0.4), tmp_path / "out")
    datasets = [ShardDataset(tmp_path / "out", split=split) for split in ("train", "heldout")]  # type: ignore[arg-type]
    train, heldout = ({dataset.group(i) for i in range(len(dataset))} for dataset in datasets)
    assert train and heldout and not train & heldout and len(train | heldout) == 8


def test_a_preview_of_the_first_part(photos: Path, tmp_path: Path) -> None:
    make(configured(photos), tmp_path / "out")  # of twelve in the first part five are bad
    sheet = decode((tmp_path / "out" / "preview.png").read_bytes())
    assert sheet.shape == (2 + 34, 2 + 8 * 34, 3)


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(b"<html>")
        (folder / f"{name}.txt").write_text("caption")
    with pytest.raises(ValueError, match=r"none of the 2 samples is left to train on \(2 not_an_image; 0 held out\)"):
        make(configured(folder), tmp_path / "out")
    assert artifacts.find(str(tmp_path / "out")) is None


def test_an_empty_heldout_split_is_an_error(photos: Path, tmp_path: Path) -> None:
    cfg = configured(photos, heldout_fraction=1e-9)
    with pytest.raises(ValueError, match=r"heldout_fraction 1e-09 of 30 samples left nothing to validate on; raise"):
        make(cfg, tmp_path / "a")


def test_large_parts_are_written_as_several_shards(photos: Path, tmp_path: Path) -> None:
    cfg = configured(photos, max_shard_bytes=20_000, part_size=100)
    names = make(cfg, tmp_path / "out").artifact.meta["shards"]["train"]
    assert len(names) > 2 and names == [f"train-00000-{k:02d}" for k in range(len(names))]


def test_the_index_says_what_a_reader_needs(photos: Path, tmp_path: Path) -> None:
    make(configured(photos), tmp_path / "out")
    for key, row in stored(tmp_path / "out").items():
        assert (row["height"], row["width"], row["format"], row["source"]) == (32, 32, "jpeg", "")
        assert row["caption_weights"] is None and key.startswith("photo")
    for path in (tmp_path / "out").glob("*.tar"):
        assert list(check_shard(path.stem, path.parent)) == []


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Files as they are found in the wild, and what becomes of each: a reason, or "" where it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    broken_exif = encoded(smooth(1), "JPEG", exif=exif.tobytes()).replace(b"Exif\0\0MM\0*", b"Exif\0\0MM\0\xff")
    frames = [smooth(2).convert("P"), smooth(3).convert("P")]
    png = encoded(smooth(4), "PNG")
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(10**8))
    text = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    huge = png[:16] + (30_000).to_bytes(4, "big") * 2 + png[24:]
    huge = huge[:29] + zlib.crc32(huge[12:29]).to_bytes(4, "big") + huge[33:]
    return {
        "good.jpg": (encoded(smooth(0), "JPEG"), ""),
        "truncated.jpg": (encoded(smooth(5), "JPEG")[:1500], "truncated"),
        "nothing.jpg": (b"", "empty"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), ""),
        "thin.png": (encoded(smooth(6, (1, 20_000)), "PNG"), ""),
        "bomb.png": (huge, "too_large"),
        "text-bomb.png": (png[:33] + text + png[33:], "corrupt"),
        "exif.jpg": (broken_exif, ""),
        "cmyk.jpg": (encoded(smooth(7).convert("CMYK"), "JPEG"), ""),
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Image size")
@pytest.mark.parametrize("kind", ["center_crop", "shorter_side", "buckets", "keep"])
def test_bad_pictures(tmp_path: Path, kind: str) -> None:
    pictures = bad_pictures()
    folder = folder_of(tmp_path, {name: data for name, (data, _) in pictures.items()})
    step = {"step": 8} if kind == "buckets" else {}
    cfg = configured(folder, resize={"kind": kind, **step}, heldout_fraction=0.3, part_size=100, max_image_pixels=2**26)
    make(cfg, tmp_path / "out")
    assert {row["source"]: row["reason"] for row in ledger(tmp_path / "out")} == {
        name: reason for name, (_, reason) in pictures.items() if reason
    }
    rows = stored(tmp_path / "out")
    assert sorted(rows) == sorted(name.split(".")[0] for name, (_, reason) in pictures.items() if not reason)
    for split in ("train", "heldout"):
        dataset = ShardDataset(tmp_path / "out", split=split)  # type: ignore[arg-type]
        for i in range(len(dataset)):
            row = rows[dataset.key(i)]
            assert dataset.image(i).shape == (row["height"], row["width"], 3)
            assert hashlib.sha256(dataset.image_bytes(i)).hexdigest() == row["sha256"]
    for path in (tmp_path / "out").glob("*.tar"):
        assert list(check_shard(path.stem, path.parent)) == []


def test_kept_images_are_the_bytes_of_the_source(photos: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = {"gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "webp": "WEBP", "png": "PNG", "jpg": "JPEG"}
    turned = encoded(smooth(9), "JPEG", exif=exif.tobytes())
    folder = folder_of(tmp_path, {f"picture.{suffix}": encoded(smooth(1), name) for suffix, name in formats.items()})
    for suffix in formats:
        (folder / f"picture.{suffix}").rename(folder / f"picture-{suffix}.{'png' if suffix == 'tiff' else suffix}")
    (folder / "turned.jpg").write_bytes(turned)
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("caption")
    (folder / "picture.txt").unlink(missing_ok=True)
    manifest = make(configured(folder, resize={"kind": "keep"}, heldout_fraction=0.4), tmp_path / "out")
    assert manifest.artifact.meta["resize"] == {"kind": "keep"} and manifest.artifact.meta["image_size"] == 32
    rows = stored(tmp_path / "out")
    assert len(rows) == 7
    assert (rows["turned"]["height"], rows["turned"]["width"]) == (120, 80)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        key = sample["__key__"]
        (original,) = [path for path in folder.glob(f"{key}.*") if path.suffix != ".txt"]
        assert sample[SUFFIX[rows[key]["format"]]] == original.read_bytes()
        assert rows[key]["sha256"] == hashlib.sha256(original.read_bytes()).hexdigest()


def test_kept_bytes_may_be_damaged(tmp_path: Path) -> None:
    """What only decoding would show is left to the reader; a search for near duplicates decodes, and rejects it."""
    whole = encoded(smooth(1), "JPEG")
    damaged = whole[:700] + b"\xff\xc0" * 40 + whole[780:]
    folder = folder_of(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(8)} | {"bad.jpg": damaged})
    for name, filters in (("kept", {}), ("hashed", {"near_duplicates": 2})):
        cfg = configured(folder, resize={"kind": "keep"}, filters=filters, heldout_fraction=0.3)
        manifest = make(cfg, tmp_path / name)
        assert manifest.artifact.meta["rejected"] == ({"corrupt": 1} if filters else {})
        assert Image.open(tmp_path / name / "preview.png").width == 8 * 122 + 2


def test_shorter_sides_and_buckets(tmp_path: Path) -> None:
    sizes = {"wide": (240, 80), "tall": (60, 90), "square": (50, 50), "odd": (95, 77)}
    folder = folder_of(tmp_path, {f"{name}.png": encoded(smooth(1, size), "PNG") for name, size in sizes.items()})
    shape = {"heldout_fraction": 0.4, "split_seed": 2}
    make(configured(folder, resize={"kind": "shorter_side"}, **shape), tmp_path / "sides")
    rows = stored(tmp_path / "sides")
    assert {key: (row["width"], row["height"]) for key, row in rows.items()} == {
        "wide": (64, 32),
        "tall": (32, 48),
        "square": (32, 32),
        "odd": (39, 32),
    }
    manifest = make(configured(folder, resize={"kind": "buckets", "step": 8}, **shape), tmp_path / "buckets")
    rows = stored(tmp_path / "buckets")
    assert {key: (row["width"], row["height"]) for key, row in rows.items()} == {
        "wide": (40, 24),  # the longest of at most 2 : 1 within 32 * 32
        "tall": (24, 40),
        "square": (32, 32),
        "odd": (32, 32),
    }
    assert manifest.artifact.meta["image_size"] == 24, "what any of them can give as a square"


def test_the_background_below_transparent_images(tmp_path: Path) -> None:
    clear = encoded(Image.new("RGBA", (40, 40), (9, 9, 9, 0)), "PNG")
    folder = folder_of(tmp_path, {f"{number}.png": clear for number in range(8)})
    make(configured(folder, background=[10, 20, 250], format="png", heldout_fraction=0.4), tmp_path / "out")
    dataset = ShardDataset(tmp_path / "out", split="train")
    assert (dataset.image(0) == (10, 20, 250)).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resize": {"kind": "keep"}, "background": [0, 0, 0]}, "background has no effect on images that resize.kind"),
        ({"resize": {"kind": "buckets", "step": 7}}, "image_size 32 is not a multiple of resize.step 7; change one"),
        ({"background": [0, 0, 256]}, "less than or equal to 255"),
    ],
)
def test_settings_that_do_not_fit(photos: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says.replace(".", r"\.")):
        configured(photos, **options)


def test_a_key_that_repeats_in_a_part_is_taken_once(tmp_path: Path) -> None:
    """A table's own keys: the first of a part stays, others go to the ledger; another part may have it again."""
    keys = ["a", "b", "a", "c", "d", "b", "a", "e"]
    table = {"image": [jpeg(n) for n in range(8)], "text": [f"caption {n}" for n in range(8)], "id": keys}
    put(tmp_path / "tables", {"0.parquet": parquet(table)})
    source = {"kind": "parquet", "path": str(tmp_path / "tables"), "key": "id"}
    cfg = shard.Config.model_validate({"source": source, "image_size": 32, "part_size": 6, "heldout_fraction": 0.4})
    manifest = make(cfg, tmp_path / "out")
    found = [(row["key"], row["reason"]) for row in ledger(tmp_path / "out")]
    assert found == [("a", "duplicate_key"), ("b", "duplicate_key")]
    datasets = [ShardDataset(tmp_path / "out", split=split) for split in ("train", "heldout")]  # type: ignore[arg-type]
    captions = sorted(dataset.captions(i)[0] for dataset in datasets for i in range(len(dataset)))
    assert captions == [f"caption {n}" for n in (0, 1, 3, 4, 6, 7)]
    assert manifest.metrics["samples_in"] == 8 and manifest.metrics["rejected_duplicate_key"] == 2


def test_filters_count_by_reason(tmp_path: Path) -> None:
    images = {f"good{n}.jpg": jpeg(n) for n in range(12)}
    images |= {"small.jpg": encoded(smooth(1, (30, 90)), "JPEG"), "long.jpg": encoded(smooth(2, (400, 80)), "JPEG")}
    images |= {"short.jpg": jpeg(20), "junk.jpg": jpeg(21), "wordy.jpg": jpeg(22), "named.jpg": jpeg(23)}
    images |= {"by-hash.jpg": jpeg(24)}
    captions = {"short.jpg": "a", "junk.jpg": "IMG_0001.JPG", "wordy.jpg": "word " * 30, "named.jpg": "b\na good one"}
    folder = folder_of(tmp_path, images, captions)
    blocklist = tmp_path / "blocked.txt"
    blocklist.write_text(f"good3\n{hashlib.sha256(jpeg(24)).hexdigest()}\n")
    limits = {"min_side": 64, "max_aspect": 3, "min_caption_chars": 3, "max_caption_words": 10, "junk_captions": True}
    cfg = configured(folder, filters={**limits, "blocklist": str(blocklist)}, part_size=5)
    manifest = make(cfg, tmp_path / "out")
    expected = {
        "small": "too_small",
        "long": "aspect",
        "short": "caption_too_short",
        "junk": "junk_caption",
        "wordy": "caption_too_long",
        "good3": "blocked",
        "by-hash": "blocked",
    }
    assert {row["key"]: row["reason"] for row in ledger(tmp_path / "out")} == expected
    assert manifest.metrics["rejected_blocked"] == 2 and manifest.artifact.meta["rejected"]["aspect"] == 1
    rows = stored(tmp_path / "out")
    assert rows["named"]["captions"] == ["a good one"] and manifest.metrics["captions_dropped"] == 1
    assert len(rows) + len(expected) == manifest.metrics["samples_in"] == 19


def test_the_blocklist_is_part_of_what_decides_the_output(photos: Path, tmp_path: Path) -> None:
    blocklist = tmp_path / "blocked.txt"
    cfg = configured(photos, filters={"blocklist": str(blocklist)})
    with pytest.raises(ValueError, match=r"filters\.blocklist: there is no file"):
        shard.source_digest(cfg)
    digests = set()
    for text in ("", "photo01"):
        blocklist.write_text(text)
        digests.add(shard.source_digest(cfg))
    assert len(digests) == 2


FULL_DISK = """
import resource, sys
from pathlib import Path
from genpipe.launch.run_stage import PartWorker
from genpipe.pipeline.spec import StageSpec
spec = StageSpec.model_validate_json(Path(sys.argv[1]).read_text())
worker = PartWorker(spec)
if sys.argv[2] != "unlimited":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
worker("00000")
"""


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_costs_the_attempt_and_nothing_else(photos: Path, tmp_path: Path, limit: int) -> None:
    """A worker that cannot write its tar fails with the system's words; the part is not done, and can be done again."""
    cfg = configured(photos, part_size=100)
    target = Artifact(kind="shards", uri=str(tmp_path / "out"), fingerprint="f" * 64)
    needs = {
        "name": "shard",
        "identity": {},
        "inputs": {},
        "store": str(tmp_path),
        "tracking_uri": "",
        "experiment": "e",
    }
    spec = StageSpec(stage="shard", config=cfg.model_dump(mode="json"), target=target, **needs)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())

    def attempt(limit: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "scratch").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(tmp_path / "spec.json"), limit],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        )

    failed = attempt(str(limit))
    assert failed.returncode == 1 and "OSError: [Errno 27] File too large" in failed.stderr, failed.stderr
    assert artifacts.finished_parts(target.uri) == {} and artifacts.find(target.uri) is None
    assert [path for path in tmp_path.glob("out/**/*") if path.is_file()] == []
    assert list((tmp_path / "scratch").iterdir()) == []
    assert attempt("unlimited").returncode == 0
    assert commit(cfg, target.uri).metrics["samples_in"] == 35


def drawn(side: tuple[int, int], box: tuple[float, float, float, float]) -> bytes:
    """A black PNG of (width, height) with a white box at these fractions of its sides."""
    image = Image.new("RGB", side)
    image.paste("white", tuple(round(part * side[axis % 2]) for axis, part in enumerate(box)))
    return encoded(image, "PNG")


@pytest.mark.parametrize("resize", ["center_crop", "shorter_side", "buckets", "keep"])
def test_classes_and_conditioning_images_travel_in_the_shards(tmp_path: Path, resize: str) -> None:
    """Pictures of two classes, each with a depth map of half its resolution: any WebDataset reader finds them."""
    box = (0.4, 0.24, 0.7, 0.76)
    for number in range(20):
        place = f"{('zebra', 'ant_lion')[number % 2]}/{number:02d}.png"
        put(tmp_path / "in", {f"images/{place}": drawn((200, 100), box), f"depth/{place}": drawn((100, 50), box)})
    source = {"kind": "folder", "path": str(tmp_path / "in"), "label": "folder", "captions": "a photo of a {label}"}
    source |= {"condition": "depth/{parent}/{stem}.png"}
    cfg = configured(tmp_path, source=source, format="png", resize={"kind": resize}, image_size=64)
    manifest = make(cfg, tmp_path / "out")
    meta = manifest.artifact.meta
    assert (meta["classes"], meta["condition"], manifest.metrics["samples_in"]) == (["ant_lion", "zebra"], True, 20)
    for shard_name in [name for names in meta["shards"].values() for name in names]:
        assert list(check_shard(shard_name, tmp_path / "out")) == []
        rows = read_index(tmp_path / "out" / f"{shard_name}.index.parquet").to_pylist()
        samples = list(webdataset.WebDataset(str(tmp_path / "out" / f"{shard_name}.tar"), shardshuffle=False).decode())
        tar = (tmp_path / "out" / f"{shard_name}.tar").read_bytes()
        for row, sample in zip(rows, samples, strict=True):
            name = meta["classes"][row["label"]]
            assert sample["cls"] == row["label"] == (0 if int(row["key"][-2:]) % 2 else 1)
            assert sample["txt"] == f"a photo of a {name.replace('_', ' ')}" and sample["json"]["meta"]["class"] == name
            condition = tar[row["condition_offset"] :][: row["condition_length"]]
            assert hashlib.sha256(condition).hexdigest() == row["condition_sha256"]
            assert row["condition_format"] == "png"
            image, map_HWC = (decode(data) for data in (tar[row["offset"] :][: row["length"]], condition))
            if resize == "keep":
                map_HWC = map_HWC.repeat(2, axis=0).repeat(2, axis=1)
            assert image.shape == map_HWC.shape
            assert ((image > 127) == (map_HWC > 127)).mean() > 0.99, "the box is at the same place"
    assert open_shards(manifest.artifact, split="train").captions(0)


def test_a_conditioning_image_of_another_aspect_is_a_reject(tmp_path: Path) -> None:
    for number in range(12):
        side = (50, 50) if number == 7 else (101, 49)
        put(tmp_path / "in", {f"{number:02d}.png": drawn((404, 196), (0, 0, 1, 0.5)), f"{number:02d}.txt": "half"})
        put(tmp_path / "in", {f"{number:02d}.depth.png": drawn(side, (0, 0, 1, 0.5)) if number != 3 else b"broken"})
    source = {"kind": "folder", "path": str(tmp_path / "in"), "condition": "{folder}/{stem}.depth.png"}
    make(configured(tmp_path, source=source), tmp_path / "out")
    found = {row["key"]: (row["reason"], row["detail"]) for row in ledger(tmp_path / "out")}
    assert {key: reason for key, (reason, _) in found.items()} == {"03": "not_an_image", "07": "condition_aspect"}
    assert "50 x 50" in found["07"][1] and "404 x 196" in found["07"][1] and "conditioning image" in found["03"][1]


def test_numbered_classes_keep_their_numbers(tmp_path: Path) -> None:
    """As ImageNet's tars have them; with the names set, they are those of the numbers."""
    members = [(f"{number:02d}.{suffix}", data) for number in range(12) for suffix, data in
               {"png": drawn((40, 40), (0, 0, 1, 0.5)), "cls": str(number % 3 * 5).encode()}.items()]  # fmt: skip
    put(tmp_path / "in", {"a.tar": tar_of(*members)})
    source = {"kind": "webdataset", "path": str(tmp_path / "in"), "label": "cls", "captions": "a {label}"}
    cfg = configured(tmp_path, source=source, heldout_fraction=0.5)
    assert "classes" not in shard.check_inputs(cfg, {})
    meta = make(cfg, tmp_path / "out").artifact.meta
    assert meta["classes"] == [str(number) for number in range(11)]
    assert {row["label"] for row in stored(tmp_path / "out").values()} == {0, 5, 10}
    names = [f"name {number}" for number in range(11)]
    named = configured(tmp_path, source=source | {"classes": names}, heldout_fraction=0.5)
    assert shard.check_inputs(named, {})["classes"] == names
    assert make(named, tmp_path / "named").artifact.meta["classes"] == names
    rows = stored(tmp_path / "named").values()
    assert all(row["captions"] == [f"a name {row['label']}"] for row in rows) and len(rows) == 12


def test_without_labels_there_is_none(photos: Path, tmp_path: Path) -> None:
    meta = make(configured(photos), tmp_path / "out").artifact.meta
    assert meta["classes"] == [] and meta["condition"] is False
    assert {(row["label"], row["condition_offset"]) for row in stored(tmp_path / "out").values()} == {(-1, None)}
