"""Tables in CSV and JSON lines: cut and read anew, against Python's own readers of the whole file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import put, source

from genpipe.data.samples import Reject
from genpipe.data.sources.records import NO_CSV, Record, cut_lines, read_lines, read_records
from genpipe.data.sources.tables import Row
from genpipe.data.sources.urls import UrlsSource
from genpipe.storage import LocalStorage, open_storage

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)


def cut_and_read(folder: Path, name: str, content: bytes, *, part_size: int) -> list[list[Record | ValueError]]:
    storage = LocalStorage(str(folder))
    storage.write(name, content)
    suffix = name[name.rindex(".") :]
    _, parts = cut_lines(storage, storage.stat(name), suffix=suffix, part_size=part_size)
    read = [list(read_lines(storage, part, suffix=suffix)) for part in parts]
    assert [len(records) for records in read] == [part.stop - part.start for part in parts]
    assert [part.start for part in parts] == [number * part_size for number in range(len(parts))]
    return read


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=12), st.integers(1, 5), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_parts_of_csv_are_its_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], part_size: int, ending: str, has_mark: bool
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=ending)
    writer.writerow(["one", "two"])
    writer.writerows(rows)
    content = ("\ufeff" * has_mark + text.getvalue()).encode()
    parts = cut_and_read(tmp_path_factory.mktemp("csv"), "t.csv", content, part_size=part_size)
    expected = [{name: cell for name, cell in zip(("one", "two"), row, strict=True) if cell} for row in rows]
    assert [record for part in parts for record in part] == expected
    assert [record for _, record in read_records(io.BytesIO(content), suffix=".csv")] == expected


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.lists(TEXT)), max_size=12), st.integers(1, 5), st.data()
)
def test_parts_of_json_lines_are_its_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], part_size: int, data: st.DataObject
) -> None:
    blanks = [data.draw(st.sampled_from(["\n", "\n\n", "\r\n", "\n  \n"])) for _ in rows]
    content = "".join(json.dumps(row) + blank for row, blank in zip(rows, blanks, strict=True)).encode()
    parts = cut_and_read(tmp_path_factory.mktemp("jsonl"), "t.jsonl", content, part_size=part_size)
    assert [record for part in parts for record in part] == rows


@settings(deadline=None)
@given(
    st.binary(max_size=200) | st.text('",\n\rab\ufeff').map(str.encode),
    st.integers(1, 5),
    st.sampled_from([".csv", ".jsonl"]),
)
def test_whatever_the_bytes_the_parts_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, part_size: int, suffix: str
) -> None:
    content = (b"one,two\n" if suffix == ".csv" else b"") + content
    parts = cut_and_read(tmp_path_factory.mktemp("any"), f"t{suffix}", content, part_size=part_size)
    whole = [record for _, record in read_records(io.BytesIO(content), suffix=suffix)]
    assert list(map(repr, (record for part in parts for record in part))) == list(map(repr, whole))


def rows_of(folder: Path, files: dict[str, bytes | str], **options: Any) -> list[Row | Reject]:
    put(folder, files)
    opened = source("urls", folder, **options)
    assert isinstance(opened, UrlsSource)
    return [row for part in opened.parts() for row in opened.tables.rows(part)]


def test_rows_of_csv_with_weights_and_faults(tmp_path: Path) -> None:
    lines = [
        "url,captions,caption_weights,note",
        'http://h/0,"[""one"", ""two""]","[3, 1]",n',
        'http://h/1,plain,,"of two\nlines"',
        "http://h/2,only two cells",
        'http://h/3,"[broken",,',
        'http://h/4,"[""one""]","[1, 2]",',
        "http://h/5,,,nothing",
        "http://h/6,caf\udce9,,",
    ]
    rows = rows_of(tmp_path, {"t.csv": "\n".join(lines).encode("utf-8", "surrogateescape")}, meta=["note"])
    found = [(row.captions, row.weights) if isinstance(row, Row) else row.reason for row in rows]
    assert found == [
        (("one", "two"), (3, 1)),
        (("plain",), ()),
        "bad_metadata",
        "bad_metadata",
        "bad_caption",
        "no_caption",
        "bad_metadata",
    ]
    assert isinstance(rows[1], Row) and rows[1].meta == {"note": "of two\nlines"} and rows[1].image == "http://h/1"
    assert [row.key for row in rows] == [f"t-{number:08d}" for number in range(7)]


def test_an_open_quote_costs_its_own_row(tmp_path: Path) -> None:
    """Python's reader would take all that follows for one caption."""
    lines = ["url,text", 'http://h/0,"never closed', "http://h/1,fine", 'http://h/2,"x" y', 'http://h/3,"two', 'lines"']
    lines += ['http://h/4,"' + "x" * 140_000 + '"', "http://h/5,last"]
    rows = rows_of(tmp_path, {"t.csv": "\n".join(lines)})
    found = [(row.image, *row.captions) if isinstance(row, Row) else (row.reason, row.source) for row in rows]
    assert found == [
        ("bad_metadata", "t.csv:0"),
        ("http://h/1", "fine"),
        ("bad_metadata", "t.csv:2"),
        ("http://h/3", "two lines"),
        ("bad_metadata", "t.csv:4"),
        ("http://h/5", "last"),
    ]
    assert isinstance(rows[0], Reject) and rows[0].detail == NO_CSV


@pytest.mark.parametrize(
    "header", ["url,text,l\u00e9gende\n".encode("latin-1"), "url,text\n".encode("utf-16"), b'url,"text\n']
)
def test_a_header_that_is_no_text_is_named(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(ValueError, match=rf"source.path: {tmp_path}/t.csv .*header.*; save it as CSV in UTF-8"):
        rows_of(tmp_path, {"t.csv": header + b"http://h/0,a,b\n"})


def test_a_column_without_a_name_is_neither_key_nor_group(tmp_path: Path) -> None:
    """pandas writes its index so, which begins anew in each table."""
    files: dict[str, bytes | str] = {f"{name}.csv": f",url,text\n0,http://h/{name},a\n" for name in ("a", "b")}
    files |= {"c.jsonl": '{"": "0", "url": "http://h/c", "text": "c"}'}
    rows = rows_of(tmp_path, files)
    assert [(row.key, row.group) for row in rows if isinstance(row, Row)] == [
        ("a-00000000", ""),
        ("b-00000000", ""),
        ("c-00000000", ""),
    ]


def test_an_empty_key_is_none(tmp_path: Path) -> None:
    lines = ['{"url": "http://h/0", "text": "a", "id": ""}', '{"url": "http://h/1", "text": "b", "id": "one"}']
    rows = rows_of(tmp_path, {"t.jsonl": "\n".join(lines)}, key="id")
    assert [row.key for row in rows] == ["t-00000000", "one"]


@pytest.mark.parametrize("name, header", [("t.csv", "url,text\n"), ("t.jsonl", "")])
def test_a_table_deleted_after_listing_is_as_many_rejects(store_uri: str, name: str, header: str) -> None:
    lines = [f"http://h/{n},{n}\n" if header else f'{{"url": "http://h/{n}", "text": "{n}"}}\n' for n in range(3)]
    put(store_uri, {name: header + "".join(lines)})
    opened = source("urls", store_uri)
    assert isinstance(opened, UrlsSource)
    open_storage(store_uri).delete(name)
    rows = list(opened.tables.rows("00000"))
    assert [(row.reason, row.source) for row in rows if isinstance(row, Reject)] == [
        ("unreadable", f"{name}:{number}") for number in range(3)
    ]


def test_columns_of_json_lines_are_those_of_the_first_rows(tmp_path: Path) -> None:
    lines = ['{"url": "http://h/0"}', '{"url": "http://h/1", "text": "a", "subject": "s"}', "[1]", "{broken"]
    first, second, *broken = rows_of(tmp_path, {"t.jsonl": "\n".join(lines)}, group="subject")
    assert isinstance(first, Reject) and first.reason == "no_caption"
    assert isinstance(second, Row) and second.group == "s"
    assert [(row.reason, row.source) for row in broken if isinstance(row, Reject)] == [
        ("bad_metadata", "t.jsonl:2"),
        ("bad_metadata", "t.jsonl:3"),
    ]
    with pytest.raises(ValueError) as error:
        rows_of(tmp_path, {}, url="link")
    assert str(error.value) == (
        f"source.url: {tmp_path}/t.jsonl has no column 'link'; its columns are url, text, subject; name another"
    )


def test_tables_of_several_kinds_and_names_give_different_keys(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.csv": "url,text\nhttp://h/0,a\n",
        "a.jsonl": '{"url": "http://h/1", "text": "b"}\n',
        "b/a.csv": "url,text\nhttp://h/2,c\n",
        "empty.csv": "url,text\n",
        "nothing.csv": "",
    }
    rows = rows_of(tmp_path, files)
    assert len({row.key for row in rows}) == 3
    assert [row.image for row in rows if isinstance(row, Row)] == ["http://h/0", "http://h/1", "http://h/2"]


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    table = pa.table([[b"image"], [b"another"], ["text"]], names=["image", "image", "text"])
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet/t.parquet")
    put(tmp_path / "csv", {"t.csv": "url,text,text,other,other\nhttp://h/0,a,b,c,d\n"})
    for kind, path, name, has in (
        ("parquet", "parquet/t.parquet", "image", "image, image, text"),
        ("urls", "csv/t.csv", "text", "url, text, text, other, other"),
    ):
        with pytest.raises(ValueError) as error:
            source(kind, tmp_path / path)
        assert str(error.value) == (
            f"source.path: {tmp_path}/{path} has several columns {name!r}; its columns are {has}; rename all but one"
        )


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        rows_of(tmp_path, {"t.csv": "url,text\n"})
    assert str(error.value) == f"source.path: the tables of {tmp_path} have no rows (1 tables read); give others"


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("part_size", [1, 2, 10])
def test_other_delimiters_are_seen_in_the_header(tmp_path: Path, delimiter: str, part_size: int) -> None:
    """As spreadsheets of many countries write them; commas in the cells are text."""
    rows = [["a.png", "one, two"], ["b.png", f"three{delimiter} four"], ["c.png", 'a "quote"']]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([["\ufefffile_name", "text"], *rows])
    parts = cut_and_read(tmp_path, "t.csv", text.getvalue().encode(), part_size=part_size)
    expected = [{"file_name": name, "text": caption} for name, caption in rows]
    assert [record for part in parts for record in part] == expected
    assert [record for _, record in read_records(io.BytesIO(text.getvalue().encode()), suffix=".csv")] == expected


def test_a_comma_in_the_header_is_the_delimiter(tmp_path: Path) -> None:
    ((record,),) = cut_and_read(tmp_path, "t.csv", b"a;b,c\n1;2,3\n", part_size=9)
    assert record == {"a;b": "1;2", "c": "3"}
