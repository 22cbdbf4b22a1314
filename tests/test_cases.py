"""What users bring, as they bring it: the right outcome, or one message that says what to do. Each test is a report.

Those that need a server or minutes are beside what they are about: shared captions (10) in evaluation/test_retrieval.py
and stages/test_clip.py, logins (19) in tracking/test_store.py, a home that cannot be written (20) in
flows/test_server.py, two runs at once (23) in tracking and flows, a moved store (24) in pipeline/test_plan.py, old
errors (25) and interrupted parts (27) in launch/test_failure.py and launch/test_ray.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter
from shard_files import make, stored
from source_files import parquet, put, tar_of

from genpipe.config import ConfigError
from genpipe.data.images import ImageError, decode, read_header
from genpipe.data.samples import Reject, Sample
from genpipe.data.sources import SourceConfig, open_source
from genpipe.launch.local import run_local
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import plan, spec_of
from genpipe.stages import shard

CASES = Path(__file__).parent / "cases"
TINY = Path(__file__).parents[1] / "configs/pipeline/tiny.yaml"


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 48)).save(buffer, "JPEG")
    return buffer.getvalue()


def opened(kind: str, path: object, **settings: Any) -> Any:
    cfg = TypeAdapter(SourceConfig).validate_python({"kind": kind, "path": str(path), **settings})
    return open_source(cfg, part_size=100)


def items(source: Any) -> tuple[dict[str, Sample], list[Reject]]:
    found = [item for part in source.parts() for item in source.read(part)]
    rejects = [item for item in found if isinstance(item, Reject)]
    return {item.key: item for item in found if isinstance(item, Sample)}, rejects


def fingerprint(store: Path, *overrides: str) -> str:
    (planned,) = plan(load_pipeline(str(TINY), [f"store={store}", *overrides]), only=["shard"])
    return planned.artifact.fingerprint


@pytest.mark.parametrize("name, red", [("display_p3", (217, 42, 52)), ("adobe_rgb", (230, 60, 60))])
def test_01_photographs_in_other_color_spaces(name: str, red: tuple[int, int, int]) -> None:
    """Stored as if they were sRGB, red (200, 60, 60) stayed what it was."""
    data = (CASES / f"icc/{name}.jpg").read_bytes()
    raw = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    nearest = np.unravel_index(np.abs(raw - (200, 60, 60)).sum(-1).argmin(), raw.shape[:2])
    assert np.abs(raw[nearest] - (200, 60, 60)).max() <= 1
    assert np.abs(decode(data)[nearest].astype(int) - red).max() <= 2


def test_03_sidecars_in_upper_case(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path, {f"IMG_{number}.JPG": jpeg(number), f"IMG_{number}.TXT": f"picture {number}"})
    found, rejects = items(opened("folder", tmp_path))
    assert {sample.captions for sample in found.values()} == {(f"picture {n}",) for n in range(4)} and not rejects


def test_04_decomposed_names(tmp_path: Path) -> None:
    """A Mac's zip has decomposed names, the captions were written elsewhere; also in a table of metadata."""
    names = ["\u00e9t\u00e9", "na\u00efve", "\uac00\ub098"]
    put(tmp_path / "a", {unicodedata.normalize("NFD", f"{name}.jpg"): jpeg(n) for n, name in enumerate(names)})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    put(tmp_path / "a", {f"{name}.txt": name for name in names})
    put(tmp_path / "b", {"metadata.jsonl": "\n".join(json.dumps({"file_name": f"{n}.jpg", "text": n}) for n in names)})
    for folder in "ab":
        found, rejects = items(opened("folder", tmp_path / folder))
        assert {sample.captions for sample in found.values()} == {(name,) for name in names} and not rejects


def test_05a_a_column_of_prompts(tmp_path: Path) -> None:
    put(tmp_path, {f"p_{n}.jpg": jpeg(n) for n in range(4)})
    lines = [json.dumps({"file_name": f"p_{n}.jpg", "prompt": f"c {n}"}) for n in range(4)]
    put(tmp_path, {"metadata.jsonl": "\n".join(lines)})
    found, rejects = items(opened("folder", tmp_path))
    assert [sample.captions for sample in found.values()] == [(f"c {n}",) for n in range(4)] and not rejects


def test_05a_another_column(tmp_path: Path) -> None:
    """Which nobody can guess: the message has the file, its fields, a line of it and the setting."""
    put(tmp_path, {"p.jpg": jpeg(0), "metadata.jsonl": json.dumps({"file_name": "p.jpg", "beschreibung": "ein Bild"})})
    with pytest.raises(ValueError) as error:
        opened("folder", tmp_path)
    for part in ("metadata.jsonl", "file_name, beschreibung", "ein Bild", "source.captions"):
        assert part in str(error.value)
    found, _ = items(opened("folder", tmp_path, captions="beschreibung"))
    assert found["p"].captions == ("ein Bild",)


def test_05b_semicolons(tmp_path: Path) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=";").writerows([["file_name", "text"], *([f"p_{n}.jpg", f"c; {n}"] for n in range(4))])
    put(tmp_path, {"metadata.csv": text.getvalue(), **{f"p_{n}.jpg": jpeg(n) for n in range(4)}})
    found, rejects = items(opened("folder", tmp_path))
    assert [sample.captions for sample in found.values()] == [(f"c; {n}",) for n in range(4)] and not rejects


@pytest.mark.parametrize("name", ["train/p.jpg", "/mnt/disk7/train/p.jpg", "C:\\train\\p.jpg"])
def test_05c_the_folder_repeated_or_absolute(tmp_path: Path, name: str) -> None:
    put(tmp_path, {"train/p.jpg": jpeg(0), "train/metadata.jsonl": json.dumps({"file_name": name, "text": "c"})})
    found, rejects = items(opened("folder", tmp_path))
    assert found["train_p"].captions == ("c",) and not rejects


def test_06_the_same_name_in_every_folder(tmp_path: Path) -> None:
    """One folder a sample, and numbered files a class: unrelated pictures are not one subject."""
    for number in range(40):
        put(tmp_path / "in", {f"{number:04d}/image.jpg": jpeg(number), f"{number:04d}/image.txt": f"picture {number}"})
    cfg = shard.Config.model_validate({"source": {"kind": "folder", "path": str(tmp_path / "in")}, "image_size": 32})
    samples = make(cfg, tmp_path / "out").artifact.meta["samples"]
    assert samples["train"] + samples["heldout"] == 40 and 0 < samples["heldout"] < 10
    assert len({row["group"] for row in stored(tmp_path / "out").values()}) == 40


def test_07_dots_in_keys(tmp_path: Path) -> None:
    """WebDataset's keys end at the first dot: a line of the ledger for each picture, with what to rename."""
    dotted = [(f"{key}.{suffix}", data) for key in ("22.05", "22.06", "23.01") for suffix, data in
              (("jpg", jpeg(0)), ("txt", b"a caption"))]  # fmt: skip
    put(tmp_path / "some", {"t.tar": tar_of(("000.jpg", jpeg(1)), ("000.txt", b"fine"), *dotted)})
    found, rejects = items(opened("webdataset", tmp_path / "some"))
    assert list(found) == ["t-000"]
    assert [(r.reason, r.source) for r in rejects] == [
        ("dotted_key", f"t.tar/{key}.jpg") for key in ("22.05", "22.06", "23.01")
    ]
    assert "first dot" in rejects[0].detail and "22_05.jpg" in rejects[0].detail
    put(tmp_path / "all", {"t.tar": tar_of(*dotted)})
    with pytest.raises(ValueError, match=r"source.path: .* t.tar has an image: .*22_05\.jpg"):
        opened("webdataset", tmp_path / "all")


def test_08_a_second_image_of_a_key(tmp_path: Path) -> None:
    members = [("photo.jpg", jpeg(0)), ("photo.txt", b"a"), ("photo.v2.jpg", jpeg(1)), ("photo.v2.txt", b"b")]
    put(tmp_path, {"t.tar": tar_of(*members)})
    found, (reject,) = items(opened("webdataset", tmp_path))
    assert list(found) == ["t-photo"]
    assert (reject.reason, reject.source) == ("second_image", "t.tar/photo.v2.jpg") and "photo_v2.jpg" in reject.detail


def test_08_nothing_that_was_brought_is_lost(tmp_path: Path) -> None:
    """Captions without a picture, and files whose suffix is on no list."""
    put(tmp_path, {"a.jpg": jpeg(0), "a.txt": "fine", "b.txt": "no picture", "c.psd": b"8BPS", "d.psd": b"8BPS"})
    found, rejects = items(opened("folder", tmp_path))
    assert list(found) == ["a"]
    assert [(r.reason, r.source) for r in rejects] == [("caption_without_image", "b.txt"), ("other_files", "c.psd")]
    assert "2 files" in rejects[1].detail and "convert" in rejects[1].detail


def write_yaml(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"base: {TINY}\n{text}")
    return str(path)


def test_11_a_stage_that_stands_twice(tmp_path: Path) -> None:
    block = "  autoencoder: {train: {samples: 320}}\n"
    path = write_yaml(tmp_path / "twice.yaml", f"stages:\n{block}  clip: {{train: {{samples: 480}}}}\n{block}")
    with pytest.raises(ConfigError) as error:
        load_pipeline(path)
    assert all(part in str(error.value) for part in (path, "'autoencoder' stands here again after line 3", "line 5"))


def test_12_an_infinite_setting(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "infinite.yaml", "stages: {autoencoder: {train: {grad_clip: .inf}}}\n")
    with pytest.raises(ConfigError) as error:
        load_pipeline(path)
    for part in (path, "stages.autoencoder.train.grad_clip", "finite number, got inf", "null: no clipping"):
        assert part in str(error.value)


def test_14_one_folder_spelled_in_many_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        put(tmp_path / "data", {f"{number}.jpg": jpeg(number), f"{number}.txt": f"picture {number}"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = [f"{tmp_path}/data", f"{tmp_path}/data/", f"{tmp_path}/./data", "data", "~/data"]
    found = {fingerprint(tmp_path / "store", f"stages.shard.source.path={way}") for way in ways}
    os.utime(tmp_path / "data/0.jpg", ns=(1, 1))
    found.add(fingerprint(tmp_path / "store", f"stages.shard.source.path={tmp_path}/data"))
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    found.add(fingerprint(tmp_path / "store", f"stages.shard.source.path={tmp_path}/moved"))
    assert len(found) == 1
    put(tmp_path / "data", {"0.txt": "Picture 0"})
    assert fingerprint(tmp_path / "store", f"stages.shard.source.path={tmp_path}/data") not in found


def test_15_a_picture_beside_a_parquet_is_replaced(tmp_path: Path) -> None:
    rows = {"image": [f"{n}.jpg" for n in range(5)], "text": [f"picture {n}" for n in range(5)]}
    put(tmp_path / "data", {"t.parquet": parquet(rows), **{f"{n}.jpg": jpeg(n) for n in range(5)}})
    source = f"stages.shard.source={{kind: parquet, path: {tmp_path}/data}}"
    first = fingerprint(tmp_path / "store", source)
    put(tmp_path / "data", {"0.jpg": jpeg(9)})
    replaced = fingerprint(tmp_path / "store", source)
    (tmp_path / "data/1.jpg").unlink()
    assert len({first, replaced, fingerprint(tmp_path / "store", source)}) == 3


def test_16_a_folder_that_changes_while_it_is_read(tmp_path: Path) -> None:
    for number in range(60):
        put(tmp_path / "data", {f"{number:03d}.jpg": jpeg(number), f"{number:03d}.txt": f"picture {number}"})
    pipeline = load_pipeline(str(TINY), [f"store={tmp_path}/store", f"stages.shard.source.path={tmp_path}/data"])
    (planned,) = plan(pipeline, only=["shard"])
    put(tmp_path / "data", {"000a.jpg": jpeg(99), "000a.txt": "came later"})
    with pytest.raises(ValueError, match=r"shard: its source changed while it was read.*run it again"):
        run_local(spec_of(planned, pipeline))
    (again,) = plan(pipeline, only=["shard"])
    samples = run_local(spec_of(again, pipeline)).meta["samples"]
    assert sum(samples.values()) == 61


@pytest.mark.parametrize("name", ["feature%2Flogin", "a?b", "with space", "a#b"])
def test_17_stores_of_any_path(tmp_path: Path, name: str) -> None:
    """Artifacts and records lie where the path says, and are found again."""
    for number in range(30):
        put(tmp_path / "data", {f"{number}.jpg": jpeg(number), f"{number}.txt": f"picture {number}"})
    settings = [f"store={tmp_path}/{name}", f"stages.shard.source.path={tmp_path}/data"]
    pipeline = load_pipeline(str(TINY), settings)
    (planned,) = plan(pipeline, only=["shard"])
    run_local(spec_of(planned, pipeline))
    assert plan(pipeline, only=["shard"])[0].status == "cached"
    assert (tmp_path / name / "mlflow.db").exists()
    files = [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()]
    assert set(files) == {"data", name}


def test_21_relative_paths_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        put(tmp_path / "project/data", {f"{number}.jpg": jpeg(number), f"{number}.txt": f"picture {number}"})
    path = write_yaml(
        tmp_path / "project/configs/mine.yaml",
        "store: ../runs\nstages: {shard: {source: {kind: folder, path: ../data}}}\n",
    )
    (tmp_path / "elsewhere").mkdir()
    found = set()
    for folder in ("project", "project/configs", "elsewhere"):
        monkeypatch.chdir(tmp_path / folder)
        (planned,) = plan(load_pipeline(path), only=["shard"])
        found.add(planned.artifact.uri)
    assert len(found) == 1 and next(iter(found)).startswith(str(tmp_path / "project/runs"))


@pytest.mark.parametrize("name", ["IMG_0001.HEIC", "renamed.jpg"])
def test_22_a_photograph_of_a_telephone(tmp_path: Path, name: str) -> None:
    """A HEIC is an image, of a kind that is not read: the ledger says so, and what to do, whatever its name."""
    data = (CASES / "heic/IMG_0001.HEIC").read_bytes()
    put(tmp_path, {name: data, f"{Path(name).stem}.txt": "a caption"})
    found, _ = items(opened("folder", tmp_path))
    assert len(found) == 1, "the list of suffixes has it"
    with pytest.raises(ImageError, match=r"unsupported: a HEIC .*convert it to JPEG or PNG"):
        read_header(data)
