from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import boto3
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import described, png, put, read_all, rejects, samples, source, tar_of

from genpipe.data.samples import Reject, Sample
from genpipe.storage import open_storage


def link(name: str, *, to: str = "", kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def test_tars_of_img2dataset(store_uri: str) -> None:
    """Shards with their parquet and statistics beside, in a folder and under S3."""
    for shard in range(3):
        keys = [f"{shard:05d}{number:04d}" for number in range(4)]
        members = [member for key in keys for member in described(key, f"caption of  {key}", similarity=0.3, width=8)]
        beside: dict[str, bytes | str] = {f"{shard:05d}_stats.json": "{}", f"{shard:05d}.parquet": b"not read"}
        put(store_uri, {f"{shard:05d}.tar": tar_of(*members), **beside})
    opened = source("webdataset", store_uri)
    assert opened.parts() == ["00000", "00001", "00002"]
    items = list(opened.read("00001"))
    assert [item.key for item in items] == [f"00001-00001{number:04d}" for number in range(4)]
    first = items[0]
    assert isinstance(first, Sample)
    assert (first.captions, first.caption_weights, first.source) == (("caption of 000010000",), (), "")
    assert (first.group, first.image) == (first.key, png(10000))
    assert first.meta == {
        "file_name": "00001.tar/000010000.jpg",
        "url": "http://host/000010000",
        "key": "000010000",
        "status": "success",
        "similarity": 0.3,
        "width": 8,
    }
    assert len(samples(opened)) == 12


def test_tars_that_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "folder/one", "png": png(), "txt": "first", "json": {"text": ["second", "third"]}})
        writer.write({"__key__": "folder/two", "webp": b"webp bytes", "txt": "only a .txt\nof two lines", "cls": 3})
    one, two = samples(source("webdataset", tmp_path / "a.tar")).values()
    assert one.key.startswith("a-folder_one-") and one.captions == ("second", "third")
    assert two.captions == ("only a .txt of two lines",) and two.image == b"webp bytes"
    assert two.meta == {"file_name": "a.tar/folder/two.webp", "ignored": ["cls"]}


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("", ["a-0", "b_c-1", "d_a-2"]),
        ("a.tar", ["a-0"]),
        ("*.tar", ["a-0", "b_c-1"]),
        ("*/a.tar", ["d_a-2"]),
        ("{a,b-c}.tar", ["a-0", "b_c-1"]),
        ("[b-z]*.tar", ["b_c-1"]),
    ],
)
def test_paths_are_files_folders_and_patterns(store_uri: str, pattern: str, expected: list[str]) -> None:
    names = ("a.tar", "b-c.tar", "d/a.tar", ".hidden.tar", ".git/x.tar")
    put(store_uri, {name: tar_of(*described(str(number))) for number, name in enumerate(names)})
    put(store_uri, {"a.txt": "no tar"})
    # d/a.tar is named by its folder too, so that no two tars give the same keys.
    found = samples(source("webdataset", f"{store_uri}/{pattern}"))
    assert list(found) == expected


def test_a_folder_may_be_named_like_a_pattern(tmp_path: Path) -> None:
    put(tmp_path / "[old] {1}", {"a.tar": tar_of(*described("0"))})
    assert list(samples(source("webdataset", tmp_path / "[old] {1}"))) == ["a-0"]
    assert list(samples(source("webdataset", tmp_path / "[old] {1}/a.tar"))) == ["a-0"]


@pytest.mark.parametrize("name", ["b.tar.gz", "b.TGZ", "b.tar.zst"])
def test_compressed_tars_are_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, {"a.tar": tar_of(*described("0")), name: gzip.compress(tar_of(*described("1"))), "notes.gz": b"x"})
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"source.path: {name} in {path} is compressed.*unpack it"):
            source("webdataset", path)
    assert list(samples(source("webdataset", tmp_path / "*.tar"))) == ["a-0"]


def test_numbered_shards_must_all_be_there(tmp_path: Path) -> None:
    put(tmp_path, {f"{number:03d}.tar": tar_of(*described(str(number))) for number in (0, 1, 3)})
    assert len(source("webdataset", tmp_path / "{000..001}.tar").parts()) == 2
    with pytest.raises(ValueError) as error:
        source("webdataset", tmp_path / "{000..004}.tar")
    assert str(error.value) == (
        f"source.path: {tmp_path}/{{000..004}}.tar names tars that do not exist (2 of 5, the first is 002.tar); add "
        "them, or narrow the pattern"
    )
    with pytest.raises(ValueError, match=r"source.path: .* has an unmatched brace"):
        source("webdataset", tmp_path / "{000..004.tar")


def test_captions_and_groups_from_fields(tmp_path: Path) -> None:
    members = [
        *described("0", "web text", recaption="long text", subject=7),
        *described("1", "web text", subject="seven"),
        *described("2", None, recaption=["same text", "same  text", "other text"]),
        *described("3", None),
    ]
    put(tmp_path, {"a.tar": tar_of(*members)})
    wanted = {"txt": 0.3, "recaption": 0.7}
    found = samples(source("webdataset", tmp_path, captions=wanted, group="subject"))
    assert found["a-0"].captions == ("long text", "web text") and found["a-0"].caption_weights == (0.7, 0.3)
    assert (found["a-0"].group, found["a-1"].group, found["a-2"].group) == ("7", "seven", "a-2")
    assert found["a-1"].captions == ("web text",) and found["a-1"].caption_weights == ()
    assert found["a-2"].captions == ("same text", "other text")
    assert found["a-2"].caption_weights == pytest.approx((0.7 * 2 / 3, 0.7 / 3))
    assert "recaption" not in found["a-0"].meta and "subject" not in found["a-0"].meta
    assert rejects(source("webdataset", tmp_path, captions=wanted)) == [("no_caption", "a.tar/3")]


def test_unsafe_members_are_rejects_and_the_others_are_read(tmp_path: Path) -> None:
    """Nothing is extracted, followed or unpickled; whatever is left alone is named."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    secret = tmp_path / "secret.txt"
    secret.write_text("not for captions")
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.type = tarfile.GNUTYPE_SPARSE
    members = [
        ("../out.jpg", png()),
        ("/abs.jpg", png()),
        ("a/../../b.txt", b"text"),
        *described("0"),
        ("linked.jpg", png()),
        link("linked.txt", to=str(secret)),
        link("hard.jpg", to="0.jpg", kind=tarfile.LNKTYPE),
        link("device.jpg", kind=tarfile.CHRTYPE),
        link("pipe.jpg", kind=tarfile.FIFOTYPE),
        link("folder", kind=tarfile.DIRTYPE),
        ("pickled.pyd", pickle.dumps(Bomb())),
        ("pickled.txt", b"a caption"),
        *described("1"),
        ("1.pickle", pickle.dumps(Bomb())),
        ("no-suffix", b"x"),
        ("._1.jpg", b"of another operating system"),
    ]
    folder = tmp_path / "tars"
    put(folder, {"a.tar": tar_of(*members)})
    opened = source("webdataset", folder)
    items = read_all(opened)
    assert [item.key for item in items if isinstance(item, Sample)] == ["a-0", "a-1"]
    assert items[-1].meta["ignored"] == ["pickle"] if isinstance(items[-1], Sample) else False
    found = {(item.reason, item.source): item.detail for item in items if isinstance(item, Reject)}
    out = "the name leads out of the tar's folder"
    assert found == {
        ("unsafe_member", "a.tar/../out.jpg"): out,
        ("unsafe_member", "a.tar//abs.jpg"): out,
        ("unsafe_member", "a.tar/a/../../b.txt"): out,
        ("unsafe_member", "a.tar/linked.txt"): f"a link to {secret}",
        ("no_caption", "a.tar/linked"): "none of text, caption, captions, prompt, prompts, description, txt has "
        "one; its members are jpg",
        ("unsafe_member", "a.tar/hard.jpg"): "a link to 0.jpg",
        ("unsafe_member", "a.tar/device.jpg"): "a device, pipe or sparse file",
        ("unsafe_member", "a.tar/pipe.jpg"): "a device, pipe or sparse file",
        ("no_image", "a.tar/pickled"): "its members are txt, pyd; pickles are never read",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.txt", "tars"]


def test_duplicate_keys(tmp_path: Path) -> None:
    members = [*described("0", "first"), *described("0", "at once"), *described("1"), *described("0", "later")]
    put(tmp_path, {"a.tar": tar_of(*members), "b.tar": tar_of(*described("0", "of another tar"))})
    opened = source("webdataset", tmp_path)
    assert {key: sample.captions for key, sample in samples(opened).items()} == {
        "a-0": ("first",),
        "a-1": ("a cat",),
        "b-0": ("of another tar",),
    }
    assert rejects(opened) == [("duplicate_key", "a.tar/0"), ("duplicate_key", "a.tar/0")]


def test_members_that_do_not_stand_together(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"a.tar": tar_of(*described("0"), ("1.jpg", png()), ("2.jpg", png()), ("1.txt", b"a"), ("2.txt", b"b"))},
    )
    opened = source("webdataset", tmp_path)
    assert list(samples(opened)) == ["a-0"]
    found = {item.key: item for item in read_all(opened) if isinstance(item, Reject)}
    assert found["a-2"].reason == "duplicate_key" and "its members (txt) do not stand together" in found["a-2"].detail
    assert [reason for reason, _ in rejects(opened)] == ["no_caption"] * 2 + ["duplicate_key"] * 2


def test_nothing_is_no_group(tmp_path: Path) -> None:
    """Neither the field whose name is empty nor an empty one: all who have it would be one subject."""
    put(
        tmp_path,
        {"a.tar": tar_of(*described("0", **{"": "5"}), *described("1", subject=""), *described("2", subject=0))},
    )
    assert samples(source("webdataset", tmp_path))["a-0"].group == "a-0"
    groups = [sample.group for sample in samples(source("webdataset", tmp_path, group="subject")).values()]
    assert groups == ["a-0", "a-1", "0"]


def test_damaged_contents_are_rejects(tmp_path: Path) -> None:
    members = [
        *described("0"),
        ("1.jpg", png()),
        ("1.txt", b"caf\xe9"),
        ("2.jpg", png()),
        ("2.json", b"{broken"),
        ("3.jpg", png()),
        ("3.json", b'["no object"]'),
        ("4.jpg", png()),
        ("4.json", b'{"caption": 4}'),
        ("5.jpg", png()),
        ("5.json", b'{"caption": "\\ud800"}'),
        ("6.jpg", png()),
        ("6.json", b'{"caption": "fine", "score": NaN}'),
        ("7.jpg", png()),
        ("7.json", b"[" * 100_000),
        ("caf\udce9.jpg", png()),
    ]
    put(tmp_path, {"a.tar": tar_of(*members)})
    opened = source("webdataset", tmp_path)
    assert rejects(opened) == [
        ("bad_caption", "a.tar/1"),
        ("bad_metadata", "a.tar/2"),
        ("bad_metadata", "a.tar/3"),
        ("bad_caption", "a.tar/4"),
        ("bad_metadata", "a.tar/5"),
        ("unsafe_member", "a.tar/caf\\udce9.jpg"),
        ("bad_metadata", "a.tar/7"),
    ]
    assert samples(opened)["a-6"].meta["score"] is None


WHOLE = tar_of(*(member for key in range(5) for member in described(str(key))))
LAST_BYTE = len(WHOLE.rstrip(b"\0"))


@settings(deadline=None)
@given(st.integers(1, LAST_BYTE))
def test_of_a_tar_cut_anywhere_the_samples_before_are_used(
    tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    put(folder, {"a.tar": WHOLE[:length]})
    items = read_all(source("webdataset", folder))
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        starts = {info.name: info.offset for info in tar}
    # A sample is known to be whole when the header of the next one is.
    whole = [key for key in range(5) if starts.get(f"{key + 1}.jpg", LAST_BYTE) + 512 <= length]
    assert [item.key for item in items[:-1]] == [f"a-{key}" for key in whole]
    assert isinstance(items[-1], Reject) and (items[-1].reason, items[-1].source) == ("truncated", "a.tar")


def test_what_cannot_be_read_of_a_tar_is_said(tmp_path: Path) -> None:
    middle = WHOLE.index(b"2.jpg")
    files: dict[str, bytes | str] = {
        "0-header.tar": WHOLE[:middle] + b"?" * 512 + WHOLE[middle + 512 :],
        "1-joined.tar": WHOLE + WHOLE,
        "2-empty.tar": b"",
        "3-text.tar": b"<html>not found</html>" * 100,
        "4-nothing.tar": tar_of(),
        "5-gzip.tar": gzip.compress(WHOLE),
    }
    put(tmp_path, files)
    opened = source("webdataset", tmp_path)
    found = [item for item in read_all(opened) if isinstance(item, Reject)]
    assert [(item.source, item.reason) for item in found] == [
        ("0-header.tar", "truncated"),
        ("1-joined.tar", "trailing_data"),
        ("2-empty.tar", "truncated"),
        ("3-text.tar", "truncated"),
        ("5-gzip.tar", "truncated"),
    ]
    assert f"the header at byte {middle} is damaged" in found[0].detail
    assert "were tars joined with cat?" in found[1].detail
    assert found[-1].detail.startswith("it is compressed; unpack it; ")
    assert list(samples(opened)) == [*(f"0_header-{key}" for key in (0,)), *(f"1_joined-{key}" for key in range(5))]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(500, 12_000), st.integers(0, 3000), st.booleans()
)
def test_slices_of_a_tar_give_each_sample_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, keys: list[int], slice_bytes: int, filling: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("sliced")
    members = [m for key in keys for m in [(f"{key}.bin", bytes(filling)), *described(str(key), f"caption {key}")]]
    content = tar_of(link("../x"), *members)
    put(folder, {"a.tar": content[:-11_000] if cut and len(content) > 22_000 else content})
    whole = read_all(source("webdataset", folder))
    sliced = read_all(source("webdataset", folder, slice_bytes=slice_bytes))

    def said_once(items: list[Sample | Reject]) -> list[Sample | Reject]:
        return [item for item in items if not isinstance(item, Reject) or item.reason != "truncated"]

    assert said_once(sliced) == said_once(whole)
    assert (said_once(sliced) == sliced) == (said_once(whole) == whole)


def test_a_member_too_large_for_an_image_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpipe.data.sources.webdataset.MAX_FILE_BYTES", 1000)
    put(tmp_path, {"a.tar": tar_of(("0.jpg", bytes(1001)), ("0.txt", b"large"), *described("1"))})
    opened = source("webdataset", tmp_path)
    assert rejects(opened) == [("too_large", "a.tar/0")] and list(samples(opened)) == ["a-1"]


def test_a_tar_deleted_after_listing_is_a_reject(store_uri: str) -> None:
    put(store_uri, {"a.tar": tar_of(*described("0")), "b.tar": tar_of(*described("0"))})
    opened = source("webdataset", store_uri)
    open_storage(store_uri).delete("b.tar")
    assert list(samples(opened)) == ["a-0"]
    assert rejects(opened) == [("unreadable", "b.tar")]


def test_a_tar_that_shrank_after_listing_gives_what_is_left(tmp_path: Path) -> None:
    content = tar_of(*(member for key in range(200) for member in described(str(key))))
    put(tmp_path, {"a.tar": content})
    opened = source("webdataset", tmp_path)
    put(tmp_path, {"a.tar": content[: len(content) - 20_000]})
    *found, last = read_all(opened)
    assert [item.key for item in found if isinstance(item, Sample)] == [f"a-{key}" for key in range(len(found))]
    assert isinstance(last, Reject) and (last.reason, last.source) == ("unreadable", "a.tar")
    assert last.key == f"a-{len(found)}" and "has it changed?" in last.detail


def test_a_link_that_leads_nowhere_is_a_reject(tmp_path: Path) -> None:
    put(tmp_path, {"a.tar": tar_of(*described("0"))})
    (tmp_path / "b.tar").symlink_to(tmp_path / "away.tar")
    os.mkfifo(tmp_path / "c.tar")
    opened = source("webdataset", tmp_path)
    assert list(samples(opened)) == ["a-0"]
    assert rejects(opened) == [("unreadable", "b.tar"), ("unreadable", "c.tar")]


def test_s3_that_is_lost_while_reading_is_no_reject(s3_server: str, tmp_path: Path) -> None:
    put(f"s3://genpipe/{tmp_path.name}", {"a.tar": tar_of(*described("0"))})
    opened = source("webdataset", f"s3://genpipe/{tmp_path.name}")
    wrong = {"aws_access_key_id": "tester", "aws_secret_access_key": "of yesterday"}
    opened.storage.client = boto3.client("s3", endpoint_url=s3_server, **wrong)  # type: ignore[attr-defined]
    with pytest.raises(PermissionError, match=r"a\.tar: .* refused access"):
        read_all(opened)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.tar"), "wb") as file:
        file.write(tar_of(*described("0")))
    with pytest.raises(ValueError) as error:
        source("webdataset", tmp_path)
    assert str(error.value) == f"source.path: the name 'caf\\udce9.tar' in {tmp_path} is not UTF-8; rename the file"


def test_digest_follows_the_tars(store_uri: str) -> None:
    put(store_uri, {"a.tar": tar_of(*described("0"))})
    before = source("webdataset", store_uri).digest()
    put(store_uri, {"a.parquet": b"unrelated"})
    assert source("webdataset", store_uri).digest() == before
    put(store_uri, {"a.tar": tar_of(*described("0", "a dog"))})
    assert source("webdataset", store_uri).digest() != before


def test_tars_without_images_or_captions_are_refused_at_once(tmp_path: Path) -> None:
    put(tmp_path / "captionless", {"a.tar": tar_of(*(m for key in range(30) for m in described(str(key), None)))})
    with pytest.raises(ValueError) as error:
        source("webdataset", tmp_path / "captionless")
    assert str(error.value) == (
        "source.path: none of the first 20 samples of a.tar has a caption: of a.tar/0, none of text, caption, "
        "captions, prompt, prompts, description, txt has one; its members are jpg, json; "
        "look at the tars and at source.captions"
    )
    put(tmp_path / "imageless", {"a.tar": tar_of(("0.npy", b"x"), ("0.txt", b"caption"))})
    with pytest.raises(ValueError, match=r"none of the first 1 samples of a.tar has an image: of a.tar/0, its members"):
        source("webdataset", tmp_path / "imageless")


def test_missing_and_empty_paths_are_named(tmp_path: Path, s3_server: str) -> None:
    with pytest.raises(ValueError) as error:
        source("webdataset", tmp_path / "nowhere")
    assert str(error.value) == (
        f"source.path: {tmp_path}/nowhere does not exist; give the folder, file or pattern of the tars"
    )
    put(tmp_path, {"a.txt": "no tar"})
    for path in (
        tmp_path,
        tmp_path / "*.tar",
        tmp_path / "a.txt",
        "s3://genpipe/nothing-here",
        "s3://genpipe/no/*.tar",
    ):
        with pytest.raises(ValueError) as error:
            source("webdataset", path)
        assert str(error.value) == (
            f"source.path: no tars in {path} (looked for .tar); give the folder, file or pattern of them"
        )
