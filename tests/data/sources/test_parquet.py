from __future__ import annotations

import datetime
import io
import json
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import parquet, png, put, read_all, rejects, samples, source

from genpipe.data.samples import LONGEST_DETAIL, Reject, Sample
from genpipe.data.sources.rowgroups import cut_row_groups
from genpipe.storage import Entry, open_storage


def numbered(count: int, *, start: int = 0, **options: Any) -> bytes:
    """Images in the layout of Hugging Face datasets."""
    numbers = range(start, start + count)
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    return parquet({"image": images, "text": [f"number {number}" for number in numbers]}, **options)


def test_the_layout_of_hugging_face(store_uri: str) -> None:
    files = {f"data/train-{shard:05d}-of-00002.parquet": numbered(5, start=5 * shard) for shard in range(2)}
    put(store_uri, {"README.md": "a card", **files})
    opened = source("parquet", store_uri)
    items = read_all(opened)
    assert [item.captions for item in items if isinstance(item, Sample)] == [(f"number {n}",) for n in range(10)]
    last = items[-1]
    assert isinstance(last, Sample)
    assert last.key == last.group == "data_train-00001-of-00002-00000004"
    assert last.image == png(9) and last.caption_weights == ()
    assert last.meta == {"file_name": "data/train-00001-of-00002.parquet:4", "path": "9.png"}


def test_a_column_of_bytes_with_weighted_captions(tmp_path: Path) -> None:
    columns = {
        "jpg": [png(0), png(1), png(2), None],
        "text": ["web", None, "web", "web"],
        "blip": [["one", "two"], ["one"], None, ["one"]],
        "subject": [7, None, 9, 9],
        "id": ["first", "a/b", None, "none"],
        "score": [0.5, float("nan"), 1.0, 1.0],
        "when": [datetime.datetime(2026, 1, 2)] * 4,
        "embedding": [[0.0] * 8] * 4,
    }
    put(tmp_path, {"a.parquet": parquet(columns)})
    options = {"captions": {"text": 0.7, "blip": 0.3}, "group": "subject", "key": "id", "meta": ["score", "when"]}
    opened = source("parquet", tmp_path, image="jpg", **options)
    first, second, third = samples(opened).values()
    assert (first.key, first.group, first.image) == ("first", "7", png(0))
    assert (first.captions, first.caption_weights) == (("web", "one", "two"), (0.7, 0.15, 0.15))
    assert first.meta == {"score": 0.5, "when": "2026-01-02 00:00:00", "file_name": "a.parquet:0"}
    assert second.key.startswith("a_b-") and second.group == second.key
    assert (second.captions, second.caption_weights, second.meta["score"]) == (("one",), (), None)
    assert (third.key, third.captions) == ("a-00000002", ("web",))
    assert rejects(opened) == [("no_image", "a.parquet:3")]
    assert json.loads(json.dumps(dict(second.meta))) == second.meta


def test_paths_are_relative_to_the_table_or_under_s3(store_uri: str, s3_server: str) -> None:
    put("s3://genpipe/elsewhere", {"x.png": png(5)})
    put(store_uri, {"tables/images/a.png": png(1), "tables/b.png": png(2), "b.png": png(3)})
    paths = ["images/a.png", "b.png", "s3://genpipe/elsewhere/x.png", "../b.png", "/etc/hostname", "file:///x"]
    paths += ["s3://genpipe/elsewhere/gone.png", "gone.png", "s3://b@d/x.png"]
    columns = {"image": paths, "caption": [f"caption {n}" for n in range(len(paths))]}
    put(store_uri, {"tables/t.parquet": parquet(columns)})
    opened = source("parquet", f"{store_uri}/tables")
    assert [sample.image for sample in samples(opened).values()] == [png(1), png(2), png(5)]
    assert [sample.group for sample in samples(opened).values()] == paths[:3]
    assert [sample.meta["path"] for sample in samples(opened).values()] == paths[:3]
    assert rejects(opened) == [
        ("unsafe_path", "t.parquet:3"),
        ("unsafe_path", "t.parquet:4"),
        ("unsafe_path", "t.parquet:5"),
        ("unreadable", "t.parquet:6"),
        ("unreadable", "t.parquet:7"),
        ("unreadable", "t.parquet:8"),
    ]
    # Named from above, the same table has the same paths: they are relative to it, not to what was listed.
    from_above = samples(source("parquet", store_uri))
    assert [sample.group for sample in from_above.values()] == ["tables/images/a.png", "tables/b.png", paths[2]]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_every_type_of_bytes_and_text(tmp_path: Path, kind: pa.DataType) -> None:
    """Dictionaries are what pandas makes of categories."""
    text = {"large_binary": pa.large_string(), "binary_view": pa.string_view()}.get(str(kind), pa.string())
    texts = pa.dictionary(pa.int32(), text) if pa.types.is_dictionary(kind) else text
    put(tmp_path / "bytes", {"t.parquet": parquet({"image": pa.array([png(1), None], kind), "text": ["a", "b"]})})
    opened = source("parquet", tmp_path / "bytes")
    assert [sample.image for sample in samples(opened).values()] == [png(1)]
    assert rejects(opened) == [("no_image", "t.parquet:1")]
    paths = {"image": pa.array(["a.png"], texts), "text": pa.array(["a"], texts)}
    put(tmp_path / "paths", {"t.parquet": parquet(paths), "a.png": png(2)})
    assert [sample.image for sample in samples(source("parquet", tmp_path / "paths")).values()] == [png(2)]


def test_cells_of_other_types_are_rejects(tmp_path: Path) -> None:
    """Of the types only those of the first table are known before the work."""
    put(tmp_path, {"a.parquet": numbered(1), "b.parquet": parquet({"image": [[1, 2]], "text": ["a list"]})})
    put(tmp_path, {"c.parquet": parquet({"image": [{"bytes": [1, 2], "path": None}], "text": ["a list of numbers"]})})
    put(tmp_path, {"d.parquet": parquet({"image": [{"bytes": "text", "path": 5}], "text": ["text for bytes"]})})
    opened = source("parquet", tmp_path)
    assert len(samples(opened)) == 1
    assert rejects(opened) == [("no_image", f"{name}.parquet:0") for name in "bcd"]


def test_a_path_that_is_no_path_does_not_fill_the_ledger(tmp_path: Path) -> None:
    put(tmp_path, {"t.parquet": parquet({"image": ["A" * 10**6], "text": ["in base64, perhaps"]})})
    (item,) = read_all(source("parquet", tmp_path))
    assert isinstance(item, Reject) and item.reason == "unreadable"
    assert len(item.detail) == LONGEST_DETAIL and "File name too long" in item.detail


def test_structs_without_bytes_hold_paths(tmp_path: Path) -> None:
    images = [{"bytes": None, "path": "a.png"}, {"bytes": png(2), "path": None}, None, {"bytes": None, "path": "a\0b"}]
    put(tmp_path, {"a.png": png(1), "t.parquet": parquet({"image": images, "text": ["caption"] * 4})})
    opened = source("parquet", tmp_path)
    assert [sample.image for sample in samples(opened).values()] == [png(1), png(2)]
    assert rejects(opened) == [("no_image", "t.parquet:2"), ("unsafe_path", "t.parquet:3")]


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 12))
def test_parts_cover_the_rows_in_order(sizes: list[int], part_size: int) -> None:
    parts = cut_row_groups(Entry("t.parquet", 0, ""), sizes, part_size=part_size)
    rows = [row for part in parts for row in range(part.start, part.stop)]
    assert rows == list(range(sum(sizes)))
    assert all(0 < part.stop - part.start <= part_size for part in parts)
    for part in parts:
        before = sum(sizes[: part.row_groups.start])
        within = before + sum(sizes[group] for group in part.row_groups)
        assert before <= part.start and part.stop <= within
        assert len(part.row_groups) == 1 or (part.start, part.stop) == (before, within), "only one group is sliced"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 80), st.integers(1, 50), st.integers(1, 50))
def test_parts_give_each_row_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group_rows: int, part_size: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    put(folder, {"a.parquet": numbered(rows, row_group_size=group_rows), "b.parquet": numbered(3, start=rows)})
    opened = source("parquet", folder, part_size=part_size)
    parts = {part: list(opened.read(part)) for part in reversed(opened.parts())}
    found = [item for part in opened.parts() for item in parts[part]]
    assert [item.captions for item in found if isinstance(item, Sample)] == [(f"number {n}",) for n in range(rows + 3)]
    assert max(map(len, parts.values())) <= part_size


def test_captions_that_are_no_text_are_rejects(tmp_path: Path) -> None:
    raw = [b"fine", b"caf\xe9", b"also fine", b" "]
    text = pa.Array.from_buffers(pa.string(), 4, pa.array(raw).buffers())
    put(tmp_path, {"a.parquet": parquet({"image": [png(n) for n in range(4)], "text": text})})
    opened = source("parquet", tmp_path)
    assert [sample.captions for sample in samples(opened).values()] == [("fine",), ("also fine",)]
    assert rejects(opened) == [("bad_metadata", "a.parquet:1"), ("no_caption", "a.parquet:3")]
    put(tmp_path, {"a.parquet": parquet({"image": [png()], "text": [3.5]})})
    assert rejects(source("parquet", tmp_path)) == [("bad_caption", "a.parquet:0")]


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([1, 10**7, 2], pa.int32()).cast(pa.date32()),  # the year 29349
        pa.array([1, 10**15, 2], pa.int64()).cast(pa.timestamp("s")),
        pa.array([1, 10**18, 2], pa.int64()).cast(pa.duration("s")),
    ],
)
def test_a_cell_that_python_cannot_hold_is_a_reject(tmp_path: Path, cells: pa.Array) -> None:
    columns = {"image": [png(n) for n in range(3)], "text": ["text"] * 3, "when": cells}
    put(tmp_path, {"a.parquet": parquet(columns)})
    opened = source("parquet", tmp_path, meta=["when"])
    assert rejects(opened) == [("bad_metadata", "a.parquet:1")] and len(samples(opened)) == 2


def test_no_row_is_lost_where_none_can_be_read(tmp_path: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array([1, 2])] * 2, names=["name", "name"])
    put(tmp_path, {"a.parquet": parquet({"image": [png(0), png(1)], "text": ["a", "b"], "facts": twice})})
    opened = source("parquet", tmp_path, meta=["facts"])
    assert rejects(opened) == [("bad_metadata", "a.parquet:0"), ("bad_metadata", "a.parquet:1")]


FOUR_GROUPS = numbered(40, row_group_size=10)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.integers(1, len(FOUR_GROUPS) // 2) | st.integers(1, 1500), st.integers(0, 255), max_size=5))
def test_damaged_bytes_are_named_or_cost_rows(tmp_path_factory: pytest.TempPathFactory, damage: dict[int, int]) -> None:
    """Most of it is in the footer, which is the end."""
    content = bytearray(FOUR_GROUPS)
    for place, value in damage.items():
        content[-place] = value
    folder = tmp_path_factory.mktemp("damaged")
    put(folder, {"a.parquet": bytes(content)})
    try:
        opened = source("parquet", folder)
    except ValueError as error:
        assert str(error).startswith("source.")
    else:
        assert [item.key for item in read_all(opened)] == [f"a-{number:08d}" for number in range(40)]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    content = bytearray(numbered(90, row_group_size=30, compression="zstd", use_dictionary=False))
    group = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(1)
    place = group.column(0).data_page_offset
    content[place : place + 400] = b"\xff" * 400
    put(tmp_path, {"a.parquet": bytes(content)})
    items = read_all(source("parquet", tmp_path))
    assert [isinstance(item, Sample) for item in items] == [True] * 30 + [False] * 30 + [True] * 30
    assert {item.reason for item in items if isinstance(item, Reject)} == {"unreadable"}
    assert [item.key for item in items] == [f"a-{number:08d}" for number in range(90)]


def test_a_table_deleted_after_listing_is_as_many_rejects(store_uri: str) -> None:
    put(store_uri, {"a.parquet": numbered(3), "b.parquet": numbered(2)})
    opened = source("parquet", store_uri)
    open_storage(store_uri).delete("a.parquet")
    assert rejects(opened) == [("unreadable", f"a.parquet:{number}") for number in range(3)]
    assert len(samples(opened)) == 2


def test_s3_that_is_lost_while_reading_is_no_reject(s3_server: str, tmp_path: Path) -> None:
    """Neither for the table nor for an image beside it."""
    remote = f"s3://genpipe/{tmp_path.name}"
    put(remote, {"a.parquet": parquet({"image": ["a.png"], "text": ["caption"]}), "a.png": png()})
    opened = source("parquet", remote)
    wrong = {"aws_access_key_id": "tester", "aws_secret_access_key": "of yesterday"}
    storage = opened.tables.storage  # type: ignore[attr-defined]
    storage.client = boto3.client("s3", endpoint_url=s3_server, **wrong)
    with pytest.raises(PermissionError, match=r"a\.parquet: .* refused access"):
        read_all(opened)
    row = next(iter(source("parquet", remote).tables.rows("00000")))  # type: ignore[attr-defined]
    with pytest.raises(PermissionError, match=r"a\.png: .* refused access"):
        opened._sample(row)  # type: ignore[attr-defined]


def test_only_the_columns_in_use_are_read(tmp_path: Path) -> None:
    """A column whose pages are destroyed does no harm unless it is asked for."""
    columns = {"image": [png(n) for n in range(9)], "text": ["text"] * 9, "other": ["x" * 500] * 9}
    content = bytearray(parquet(columns, use_dictionary=False, compression="zstd"))
    other = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(2)
    content[other.data_page_offset : other.data_page_offset + other.total_compressed_size] = bytes(
        other.total_compressed_size
    )
    put(tmp_path, {"a.parquet": bytes(content)})
    assert len(samples(source("parquet", tmp_path))) == 9
    assert len(rejects(source("parquet", tmp_path, meta=["other"]))) == 9


def test_digest_follows_the_tables(store_uri: str) -> None:
    put(store_uri, {"a.parquet": numbered(2)})
    before = source("parquet", store_uri).digest()
    assert source("parquet", store_uri).digest() == before
    put(store_uri, {"a.parquet": numbered(2, start=1)})
    assert source("parquet", store_uri).digest() != before


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    put(tmp_path, {"a.parquet": parquet({"Image": [png()], "TEXT": ["caption"], "size": [3]})})
    where, has = f"{tmp_path}/a.parquet", "its columns are Image, TEXT, size"
    for options, message in (
        ({}, f"source.image: {where} has no column 'image'; {has}; did you mean 'Image'?"),
        (
            {"image": "Image"},
            f"source.captions: {where} has none of the columns text, caption, captions; {has}; name those with "
            "captions",
        ),
        (
            {"image": "Image", "captions": "text"},
            f"source.captions: {where} has no column 'text'; {has}; did you mean 'TEXT'?",
        ),
        (
            {"image": "Image", "captions": "TEXT", "group": "subject"},
            f"source.group: {where} has no column 'subject'; {has}; name another",
        ),
        (
            {"image": "size", "captions": "TEXT"},
            "source.image: the column 'size' holds int64, no images or paths; name another",
        ),
    ):
        with pytest.raises(ValueError) as error:
            source("parquet", tmp_path, **options)
        assert str(error.value) == message


def test_tables_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    put(tmp_path / "broken", {"a.parquet": numbered(3)[:-20]})
    with pytest.raises(ValueError, match=r"source.path: .*/broken/a.parquet is not intact parquet: .*; replace it"):
        source("parquet", tmp_path / "broken")
    put(tmp_path / "empty", {"a.parquet": parquet({"image": [], "text": []})})
    with pytest.raises(ValueError, match=rf"source.path: the tables of {tmp_path}/empty have no rows.*give others"):
        source("parquet", tmp_path / "empty")
    put(tmp_path / "none", {"a.csv": "image,text\n"})
    with pytest.raises(ValueError) as error:
        source("parquet", tmp_path / "none")
    assert str(error.value) == (
        f"source.path: no tables in {tmp_path}/none (looked for .parquet); give the folder, file or pattern of them"
    )


def test_digest_follows_the_images_beside(store_uri: str) -> None:
    """A picture that is replaced, or taken away, is another source; one that no row names is not."""
    rows = {"image": ["x/0.png", "1.png", "../out.png", "gone.png"], "text": ["a"] * 4}
    struct = {
        "image": [{"bytes": None, "path": "x/0.png"}, {"bytes": png(), "path": "not there.png"}],
        "text": ["a"] * 2,
    }
    for table in (rows, struct):
        files: dict[str, bytes | str] = {
            "t.parquet": parquet(table),
            "x/0.png": png(1),
            "1.png": png(2),
            "2.png": png(3),
        }
        put(store_uri, files)
        first = source("parquet", store_uri).digest()
        put(store_uri, {"2.png": png(9)})
        assert source("parquet", store_uri).digest() == first
        put(store_uri, {"x/0.png": png(4)})
        replaced = source("parquet", store_uri).digest()
        open_storage(store_uri).delete("x/0.png")
        assert len({first, replaced, source("parquet", store_uri).digest()}) == 3


def test_a_digest_reads_no_column_of_bytes(tmp_path: Path) -> None:
    """Hugging Face's tables name a path beside the bytes, which leads nowhere and is not looked for."""
    put(tmp_path, {"t.parquet": numbered(3)})
    opened = source("parquet", tmp_path)
    first = opened.digest()
    put(tmp_path, {"0.png": png(8)})
    assert source("parquet", tmp_path).digest() == first
    assert opened.tables.has_nulls("image.bytes") is False  # type: ignore[attr-defined]
