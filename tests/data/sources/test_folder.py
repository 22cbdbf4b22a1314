from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from source_files import parquet, png, put, read_all, rejects, samples, source

from genpipe.data.samples import Reject, Sample, clean_captions, weigh_captions
from genpipe.storage import open_storage


def test_sidecars_give_one_caption_a_line(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"cat.png": png(), "cat.txt": "a cat\n\n  a  small\tcat \na cat\n", "sub/dog.PNG": png("blue")},
    )
    put(tmp_path, {"sub/dog.txt": "a dog"})
    found = samples(source("folder", tmp_path))
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
    found = samples(source("folder", tmp_path))
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
    assert samples(source("folder", tmp_path))["a"].captions == ("fine",)
    assert sorted(rejects(source("folder", tmp_path))) == [
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
    assert rejects(source("folder", tmp_path)) == [
        ("no_caption", "b.png"),
        ("no_caption", "c.png"),
        ("bad_caption", "d.png"),
    ]


def test_a_file_deleted_after_listing_is_a_reject(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "a.txt": "fine"})
    opened = source("folder", tmp_path)
    (tmp_path / "a.png").unlink()
    (item,) = read_all(opened)
    assert isinstance(item, Reject) and item.reason == "unreadable" and "a.png" in item.detail


def test_files_too_large_for_memory_are_rejects(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"a.png": b"", "a.txt": "a film, perhaps", "b.png": png(), "b.txt": "", "c.png": png(), "c.txt": "fine"},
    )
    for name in ("a.png", "b.txt"):
        os.truncate(tmp_path / name, 2**40)  # of nothing, which takes no space
    opened = source("folder", tmp_path)
    assert rejects(opened) == [("too_large", "a.png"), ("too_large", "b.png")] and list(samples(opened)) == ["c"]


def test_links_that_lead_nowhere_are_rejects(tmp_path: Path) -> None:
    """As of a data set whose files were left behind."""
    put(tmp_path, {"a.png": png(), "a.txt": "fine", "b.txt": "gone", "c.png": png(), "d.txt": "no picture"})
    (tmp_path / "b.png").symlink_to(tmp_path / "away.png")
    (tmp_path / "c.txt").symlink_to(tmp_path / "c.txt")
    os.mkfifo(tmp_path / "d.png")
    assert rejects(source("folder", tmp_path)) == [
        ("unreadable", "b.png"),
        ("unreadable", "c.png"),
        ("unreadable", "d.png"),
    ]


def test_names_that_clash_get_different_keys_and_the_same_group(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "a.gif": png(), "a.txt": "both", "b.c.png": png(), "b.c.txt": "dotted"})
    items = [item for item in read_all(source("folder", tmp_path)) if isinstance(item, Sample)]
    assert len({item.key for item in items}) == 3
    assert {item.group for item in items} == {"a", "b.c"}
    assert all("." not in item.key for item in items)


def test_a_name_that_is_no_text_is_a_reject(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "a.txt": "fine"})
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(png())
    assert rejects(source("folder", tmp_path)) == [("bad_name", r"caf\udce9.png")]
    assert len(source("folder", tmp_path).digest()) == 64


def test_hidden_files_are_not_samples(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"a.png": png(), "a.txt": "fine", ".b.png": png(), ".cache/c.png": png(), ".cache/c.txt": "no"},
    )
    assert list(samples(source("folder", tmp_path))) == ["a"]


@pytest.mark.parametrize("count, expected", [(1, 1), (5, 2), (6, 2), (7, 3)])
def test_parts_hold_part_size_samples_and_cover_all(tmp_path: Path, count: int, expected: int) -> None:
    for number in range(count):
        put(tmp_path, {f"{number}.png": png(), f"{number}.txt": f"number {number}"})
    opened = source("folder", tmp_path, part_size=3)
    assert len(opened.parts()) == expected
    assert [item.key for item in read_all(opened)] == [str(number) for number in range(count)]


def test_digest_follows_names_and_content_alone(tmp_path: Path) -> None:
    put(tmp_path / "here", {"a.png": png(), "a.txt": "fine", "unrelated.md": "notes"})
    digest = source("folder", tmp_path / "here").digest()
    assert source("folder", tmp_path / "here").digest() == digest and len(digest) == 64
    put(tmp_path / "here", {"unrelated.md": "longer notes"})
    os.utime(tmp_path / "here/a.txt", ns=(1, 1))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for path in ("here", "here/", "./here", "there"):
        assert source("folder", f"{tmp_path}/{path}").digest() == digest
    put(tmp_path / "here", {"a.txt": "nice"})
    same_size = source("folder", tmp_path / "here").digest()
    for suffix in ("png", "txt"):
        (tmp_path / f"there/a.{suffix}").rename(tmp_path / f"there/b.{suffix}")
    assert len({digest, same_size, source("folder", tmp_path / "there").digest()}) == 3


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source.path: .*/nowhere does not exist; give the folder"):
        source("folder", tmp_path / "nowhere")
    put(tmp_path, {"file": "x"})
    with pytest.raises(ValueError, match=r"source.path: .*/file is not a folder; give the folder"):
        source("folder", tmp_path / "file")


def test_a_folder_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    put(tmp_path, {"a.txt": "a caption", "b.svg": "x"})
    with pytest.raises(ValueError, match=r"no images in .* \(looked for \.avif, \.bmp, \.gif, .*\); give"):
        source("folder", tmp_path)


def test_a_folder_without_captions_says_what_would_be_one(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png()})
    with pytest.raises(ValueError) as error:
        source("folder", tmp_path)
    assert "no captions for the 1 images" in str(error.value)
    assert "a.txt" in str(error.value) and '{"file_name": "a.png", "text": "a caption"}' in str(error.value)


@pytest.mark.parametrize("in_csv", [False, True])
def test_weighted_captions_in_metadata(tmp_path: Path, in_csv: bool) -> None:
    lists = ['["one", "two"]', '["one", "one "]', '["one", "two"]', '["one", ""]', *['["one"]'] * 7]
    weights = ["[3, 1]", "[3, 1]", "[2, 2]", "[0.5, 0.5]"]
    weights += ["[1, 2]", "[0]", '["1"]', "[-1]", f"[1{'0' * 400}]", "[1e39]", "[1e-50]"]
    names = [f"{number}.png" for number in range(len(lists))]
    if in_csv:
        quoted = [[cell.replace('"', '""') for cell in row] for row in zip(lists, weights, strict=True)]
        lines = ["file_name,captions,caption_weights"]
        lines += [f'{name},"{texts}","{weight}"' for name, (texts, weight) in zip(names, quoted, strict=True)]
        put(tmp_path, {"metadata.csv": "\n".join(lines)})
    else:
        rows = zip(names, lists, weights, strict=True)
        lines = [f'{{"file_name": "{name}", "captions": {texts}, "caption_weights": {w}}}' for name, texts, w in rows]
        put(tmp_path, {"metadata.jsonl": "\n".join(lines)})
    put(tmp_path, {name: png(number) for number, name in enumerate(names)})
    opened = source("folder", tmp_path)
    found = samples(opened)
    assert (found["0"].captions, found["0"].caption_weights) == (("one", "two"), (3, 1))
    assert (found["1"].captions, found["1"].caption_weights) == (("one",), ())
    assert (found["2"].captions, found["2"].caption_weights) == (("one", "two"), ())
    assert (found["3"].captions, found["3"].caption_weights) == (("one",), ())
    faults = [item for item in read_all(opened) if isinstance(item, Reject) and item.reason == "bad_metadata"]
    assert len(faults) == 7
    assert {fault.detail for fault in faults} == {
        "caption_weights must be a list with a number from 1e-30 to 1e+30 for each of the 1 captions"
    }
    assert len(found) == 4


def test_metadata_csv_as_image_folder_has_it(tmp_path: Path) -> None:
    lines = [
        "\ufefffile_name,text,group,license",
        "a.png,a cat,pets,CC0",
        'b/b.png,"two\nlines",,',
        "c.png,,,",
        "short",
    ]
    put(tmp_path, {"metadata.csv": "\r\n".join(lines), **{name: png() for name in ("a.png", "b/b.png", "c.png")}})
    put(tmp_path, {"c.txt": "of the sidecar"})
    opened = source("folder", tmp_path)
    found = samples(opened)
    assert found["a"].captions == ("a cat",) and found["a"].group == "pets"
    assert found["a"].meta == {"license": "CC0", "file_name": "a.png"}
    assert found["b_b"].captions == ("two lines",) and found["b_b"].group == "b/b"
    assert found["c"].captions == ("of the sidecar",)
    assert rejects(opened) == [("bad_metadata", "metadata.csv:6")]


def test_metadata_csv_that_is_damaged(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": png(), "b.png": png(), "metadata.csv": 'file_name,text\na.png,"never closed\nb.png,fine\n'})
    opened = source("folder", tmp_path)
    assert samples(opened)["b"].captions == ("fine",)
    assert rejects(opened) == [("no_caption", "a.png"), ("bad_metadata", "metadata.csv:2")]
    put(tmp_path, {"metadata.csv": "file_name,text,l\u00e9gende\na.png,fine,x\n".encode("latin-1")})
    with pytest.raises(ValueError, match=r"^source.path: .*/metadata.csv .*header.*UTF-8"):
        source("folder", tmp_path)


def test_metadata_in_parquet(store_uri: str) -> None:
    when = datetime.date(2026, 1, 2)
    columns = {"file_name": ["a.png", "gone.png", "b.png"], "text": [["one", "two"], ["none"], []], "when": [when] * 3}
    put(store_uri, {"train/a.png": png(1), "train/b.png": png(2), "train/metadata.parquet": parquet(columns)})
    opened = source("folder", store_uri)
    assert samples(opened)["train_a"].captions == ("one", "two")
    assert samples(opened)["train_a"].meta == {"when": "2026-01-02", "file_name": "train/a.png"}
    assert rejects(opened) == [("no_caption", "train/b.png"), ("missing_file", "train/metadata.parquet:1")]
    put(store_uri, {"train/metadata.parquet": b"PAR1, but no more"})
    with pytest.raises(ValueError, match=r"^source.path: .*/train/metadata.parquet is not intact parquet: "):
        source("folder", store_uri)


def test_captions_of_named_fields(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "web", "blip": "long"}, {"file_name": "b.png", "text": "web"}]
    put(tmp_path, {"a.png": png(1), "b.png": png(2), "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    found = samples(source("folder", tmp_path, captions={"text": 1, "blip": 3}))
    assert (found["a"].captions, found["a"].caption_weights) == (("long", "web"), (3, 1))
    assert (found["b"].captions, found["b"].caption_weights) == (("web",), ())
    only = samples(source("folder", tmp_path, captions="blip"))
    assert list(only) == ["a"] and only["a"].captions == ("long",) and only["a"].meta["text"] == "web"


def test_a_folder_under_s3_gives_what_a_local_one_gives(tmp_path: Path, s3_server: str) -> None:
    remote = f"s3://genpipe/{tmp_path.name}"
    files: dict[str, bytes | str] = {f"many/{number:03d}.png": png(number) for number in range(50)}
    files |= {f"many/{number:03d}.txt": f"number {number}\nagain {number}" for number in range(49)}
    files |= {"x/a.png": png(), "x/metadata.jsonl": '{"file_name": "a.png", "text": "a", "group": "g"}', "y.md": "-"}
    for uri in (tmp_path, remote):
        put(uri, files)
    here, there = source("folder", tmp_path, part_size=20), source("folder", remote, part_size=20)
    assert there.parts() == here.parts() == ["00000", "00001", "00002"]
    assert read_all(there) == read_all(here) and len(samples(there)) == 50
    before = there.digest()
    assert source("folder", remote).digest() == before
    put(remote, {"x/a.png": png("blue")})
    assert source("folder", remote).digest() != before
    open_storage(remote).delete("many/000.png")
    assert ("unreadable", "many/000.png") in rejects(there)


def test_a_missing_folder_under_s3_is_named(s3_server: str) -> None:
    with pytest.raises(
        ValueError, match=r"^source.path: no images in s3://genpipe/nowhere or its subfolders \(looked "
    ):
        source("folder", "s3://genpipe/nowhere")
    with pytest.raises(
        ValueError, match=r"^source.path: s3://no-such-bucket/photos: .* has no bucket no-such-bucket; "
    ):
        source("folder", "s3://no-such-bucket/photos")


def test_s3_that_is_lost_while_reading_is_no_reject(s3_server: str, tmp_path: Path) -> None:
    """A service that cannot be reached must stop the part, not fill the ledger."""
    put(f"s3://genpipe/{tmp_path.name}", {"a.png": png(), "a.txt": "caption"})
    opened = source("folder", f"s3://genpipe/{tmp_path.name}")
    storage = opened.storage  # type: ignore[attr-defined]
    storage.client = boto3.client("s3", endpoint_url="http://127.0.0.1:9", config=Config(retries={"max_attempts": 0}))
    with pytest.raises(ConnectionError, match=r"a\.txt: http://127.0.0.1:9 cannot be reached"):
        read_all(opened)
    wrong = {"aws_access_key_id": "tester", "aws_secret_access_key": "of yesterday"}
    storage.client = boto3.client("s3", endpoint_url=s3_server, **wrong)
    with pytest.raises(PermissionError, match=r"a\.txt: .* refused access"):
        read_all(opened)


def test_clean_captions() -> None:
    assert clean_captions([" a\x00b\r\n c", "", "a b c", "cafe\u0301"]) == ("a b c", "caf\u00e9")
    assert clean_captions(["\ufeff", " \u200b\u00a0", "\x00", "\u2060\u200d"]) == ()
    heart = "a heart: \u2764\ufe0f\u200d\U0001f525"
    assert clean_captions([heart]) == (heart,), "what is invisible may join what is not"


def test_a_caption_too_long_to_be_cleaned_in_time(tmp_path: Path) -> None:
    accents = "a" + "\u0301\u0327" * 500_000  # which take Unicode's normal form a quarter of an hour
    put(tmp_path, {"a.png": png(), "a.txt": accents, "b.png": png(), "b.txt": "fine", "c.png": png()})
    put(tmp_path, {"metadata.jsonl": json.dumps({"file_name": "c.png", "text": [accents]})})
    opened = source("folder", tmp_path)
    assert rejects(opened) == [("bad_caption", "a.png"), ("no_caption", "c.png"), ("bad_metadata", "metadata.jsonl:1")]
    assert list(samples(opened)) == ["b"]


def test_weigh_captions() -> None:
    assert weigh_captions([("a", 1), (" a ", 2), ("b", 1), ("", 5)]) == (("a", "b"), (3, 1))
    assert weigh_captions([("a", 2), ("b", 2)]) == (("a", "b"), ())
    assert weigh_captions([]) == ((), ())
