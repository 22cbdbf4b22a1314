from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from genpipe.data.samples import Reject, Sample, clean_captions
from genpipe.data.sources import FolderConfig, Source, open_source


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def folder_source(folder: Path, *, part_size: int = 100) -> Source:
    return open_source(FolderConfig(kind="folder", path=str(folder)), part_size=part_size)


def read_all(source: Source) -> list[Sample | Reject]:
    return [item for part in source.parts() for item in source.read(part)]


def samples(folder: Path) -> dict[str, Sample]:
    return {item.key: item for item in read_all(folder_source(folder)) if isinstance(item, Sample)}


def rejects(folder: Path) -> list[tuple[str, str]]:
    return [(item.reason, item.source) for item in read_all(folder_source(folder)) if isinstance(item, Reject)]


def test_sidecars_give_one_caption_a_line(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"cat.png": png(), "cat.txt": "a cat\n\n  a  small\tcat \na cat\n", "sub/dog.PNG": png("blue")},
    )
    put(tmp_path, {"sub/dog.txt": "a dog"})
    found = samples(tmp_path)
    assert found["cat"].captions == ("a cat", "a small cat")
    assert (found["cat"].group, found["cat"].image) == ("cat", png())
    assert found["sub_dog"].captions == ("a dog",)
    assert found["sub_dog"].meta["file_name"] == "sub/dog.PNG"


def test_metadata_gives_captions_group_and_meta(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "first", "group": "subject", "width": 8},
        {"file_name": "b.png", "captions": ["one", "two"], "caption": "zero", "group": 7},
    ]
    put(tmp_path, {"x/a.png": png(), "x/b.png": png(), "x/metadata.jsonl": "\n".join(map(json.dumps, rows))})
    found = samples(tmp_path)
    assert found["x_a"].captions == ("first",) and found["x_a"].group == "subject"
    assert found["x_a"].meta == {"width": 8, "file_name": "x/a.png"}
    assert found["x_b"].captions == ("zero", "one", "two") and found["x_b"].group == "7"


def test_metadata_faults_are_rejects_with_their_line(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "a.png", "text": "fine"}',
        '{"file_name": "a.png", "text": "again"}',
        '{"file_name": "gone.png", "text": "no such file"}',
        "{broken",
        '{"text": "no name"}',
        '{"file_name": "../outside.png", "text": "escapes"}',
        '{"file_name": "b.png", "text": 5}',
        '{"file_name": "b.png", "text": "b", "group": []}',
        "[]",
        '{"file_name": "b.png", "text": "\\ud800"}',
        '{"file_name": "b.png", "text": "b", "score": NaN}',
    ]
    put(tmp_path, {"a.png": png(), "b.png": png(), "metadata.jsonl": "\n".join(lines)})
    assert samples(tmp_path)["a"].captions == ("fine",)
    assert sorted(rejects(tmp_path)) == [
        ("bad_metadata", "metadata.jsonl:10"),
        ("bad_metadata", "metadata.jsonl:11"),
        ("bad_metadata", "metadata.jsonl:4"),
        ("bad_metadata", "metadata.jsonl:5"),
        ("bad_metadata", "metadata.jsonl:6"),
        ("bad_metadata", "metadata.jsonl:7"),
        ("bad_metadata", "metadata.jsonl:8"),
        ("bad_metadata", "metadata.jsonl:9"),
        ("duplicate_key", "metadata.jsonl:2"),
        ("missing_file", "metadata.jsonl:3"),
        ("no_caption", "b.png"),
    ]


def test_images_without_a_usable_caption_are_rejects(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "a.txt": "fine", "b.png": png(), "c.png": png(), "c.txt": " \n"})
    put(tmp_path, {"d.png": png(), "d.txt": b"caf\xe9"})
    assert rejects(tmp_path) == [("no_caption", "b.png"), ("no_caption", "c.png"), ("bad_caption", "d.png")]


def test_a_file_deleted_after_listing_is_a_reject(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "a.txt": "fine"})
    source = folder_source(tmp_path)
    (tmp_path / "a.png").unlink()
    (item,) = read_all(source)
    assert isinstance(item, Reject) and item.reason == "unreadable" and "a.png" in item.detail


def test_names_that_clash_get_different_keys_and_the_same_group(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "a.gif": png(), "a.txt": "both", "b.c.png": png(), "b.c.txt": "dotted"})
    items = [item for item in read_all(folder_source(tmp_path)) if isinstance(item, Sample)]
    assert len({item.key for item in items}) == 3
    assert {item.group for item in items} == {"a", "b.c"}
    assert all("." not in item.key for item in items)


def test_a_name_that_is_no_text_is_a_reject(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "a.txt": "fine"})
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(png())
    assert rejects(tmp_path) == [("bad_name", r"'caf\udce9.png'")]
    assert len(folder_source(tmp_path).digest()) == 64


def test_hidden_files_are_not_samples(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"a.png": png(), "a.txt": "fine", ".b.png": png(), ".cache/c.png": png(), ".cache/c.txt": "no"},
    )
    assert list(samples(tmp_path)) == ["a"]


@pytest.mark.parametrize("count, expected", [(1, 1), (5, 2), (6, 2), (7, 3)])
def test_parts_hold_part_size_samples_and_cover_all(tmp_path: Path, count: int, expected: int) -> None:
    for number in range(count):
        put(tmp_path, {f"{number}.png": png(), f"{number}.txt": f"number {number}"})
    source = folder_source(tmp_path, part_size=3)
    assert len(source.parts()) == expected
    assert [item.key for item in read_all(source)] == [str(number) for number in range(count)]


def test_digest_follows_names_sizes_and_times(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "a.txt": "fine", "unrelated.md": "notes"})
    digest = folder_source(tmp_path).digest()
    assert folder_source(tmp_path).digest() == digest and len(digest) == 64
    put(tmp_path, {"unrelated.md": "longer notes"})
    assert folder_source(tmp_path).digest() == digest
    put(tmp_path, {"a.txt": "changed"})
    changed = folder_source(tmp_path).digest()
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert len({digest, changed, folder_source(tmp_path).digest()}) == 3


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source.path: .*/nowhere does not exist; give the folder"):
        folder_source(tmp_path / "nowhere")
    put(tmp_path, {"file": "x"})
    with pytest.raises(ValueError, match=r"source.path: .*/file is not a folder; give the folder"):
        folder_source(tmp_path / "file")


def test_a_folder_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    put(tmp_path, {"a.txt": "a caption", "b.tiff": "x"})
    with pytest.raises(ValueError, match=r"no images in .* \(looked for \.bmp, \.gif, \.jpeg, .*\); give"):
        folder_source(tmp_path)


def test_a_folder_without_captions_says_what_would_be_one(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "metadata.jsonl": '{"file_name": "a.png", "text": ""}'})
    with pytest.raises(ValueError) as error:
        folder_source(tmp_path)
    assert "no captions for the 1 images" in str(error.value)
    assert "a.txt" in str(error.value) and '{"file_name": "a.png", "text": "a caption"}' in str(error.value)


def test_clean_captions() -> None:
    assert clean_captions([" a\x00b\r\n c", "", "a b c", "cafe\u0301"]) == ("a b c", "caf\u00e9")
