"""Class labels and conditioning images, from every kind of source that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError
from source_files import parquet, png, put, rejects, samples, source, tar_of

from genpipe.data.sources import MixConfig, declared_classes, has_conditions, open_source


def labels(opened: Any) -> dict[str, str | None]:
    return {key: sample.label for key, sample in samples(opened).items()}


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    put(
        tmp_path, {"train/snow_owl/1.png": png(1), "train/ant/1.png": png(2), "train/ant/2.png": png(3), "x.png": png()}
    )
    opened = source("folder", tmp_path, label="folder", captions={"a photo of a {label}": 3, "{label}": 1})
    assert opened.classes() == ("ant", "snow_owl")
    assert labels(opened) == {"train_ant_1": "ant", "train_ant_2": "ant", "train_snow_owl_1": "snow_owl"}
    owl = samples(opened)["train_snow_owl_1"]
    assert (owl.captions, owl.caption_weights) == (("a photo of a snow owl", "snow owl"), (3, 1))
    assert rejects(opened) == [("no_label", "x.png")]
    with pytest.raises(ValueError, match=r"source.label: folder and source.captions: \"\{label\}\""):
        source("folder", tmp_path)
    with pytest.raises(ValidationError, match="needs a label"):
        source("folder", tmp_path, captions="{label}")
    with pytest.raises(ValueError, match=r"source.label: no image of .*/ant lies in a subfolder"):
        source("folder", tmp_path / "train/ant", label="folder", captions="{label}")


def test_labels_and_conditions_in_metadata(tmp_path: Path) -> None:
    """As the ControlNet datasets of Hugging Face are: an image, a conditioning image, a text."""
    rows: list[dict[str, Any]] = [
        {"file_name": "a.png", "conditioning_image": "edges/a.png", "text": "an ant", "kind": 7},
        {"file_name": "b.png", "conditioning_image": "edges/b.png", "text": "a bee", "kind": 2},
        {"file_name": "c.png", "conditioning_image": "edges/gone.png", "text": "a cat", "kind": 2},
        {"file_name": "d.png", "conditioning_image": "edges/b.png", "text": "a dog"},
        {"file_name": "e.png", "conditioning_image": "edges/b.png", "text": "an elk", "kind": 0.5},
    ]
    put(tmp_path, {f"{name}.png": png(number) for number, name in enumerate("abcde")})
    put(tmp_path, {"edges/a.png": png(10), "edges/b.png": png(11), "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    opened = source("folder", tmp_path, label="kind", condition="conditioning_image")
    assert labels(opened) == {"a": "7", "b": "2"} and opened.classes() == ("0", "1", "2", "3", "4", "5", "6", "7")
    assert [sample.condition for sample in samples(opened).values()] == [png(10), png(11)]
    assert samples(opened)["a"].meta == {"file_name": "a.png"}
    assert rejects(opened) == [
        ("no_condition", "c.png"),
        ("no_label", "d.png"),
        ("no_label", "e.png"),
        ("bad_metadata", "metadata.jsonl:5"),
    ]
    with pytest.raises(ValueError, match=r"source.label: no image has the field 'class'"):
        source("folder", tmp_path, label="class")


def test_conditions_beside_the_images(tmp_path: Path) -> None:
    put(tmp_path, {"x/a.png": png(1), "x/a.txt": "a", "x/a.depth.png": png(2), "x/b.png": png(3), "x/b.txt": "b"})
    opened = source("folder", tmp_path, condition="{folder}/{stem}.depth.png")
    assert [sample.condition for sample in samples(opened).values()] == [png(2)]
    assert rejects(opened) == [("no_condition", "x/b.png")]


def test_columns_of_parquet(tmp_path: Path) -> None:
    columns = {
        "image": [png(number) for number in range(4)],
        "depth": [{"bytes": png(9), "path": None}, {"bytes": None, "path": "d.png"}, None, {"bytes": png(8)}],
        "text": ["one", "two", "three", "four"],
        "breed": ["tabby", "beagle", "beagle", None],
    }
    put(tmp_path, {"t.parquet": parquet(columns), "d.png": png(7)})
    opened = source("parquet", tmp_path, label="breed", condition="depth", captions=["text", "a {label}"])
    assert opened.classes() == ("beagle", "tabby")
    found = list(samples(opened).values())
    assert [(sample.label, sample.condition) for sample in found] == [("tabby", png(9)), ("beagle", png(7))]
    assert found[0].captions == ("a tabby", "one")
    assert rejects(opened) == [("no_condition", "t.parquet:2"), ("no_label", "t.parquet:3")]


@pytest.mark.parametrize(
    "labels, expected", [([2.0, float("nan"), 0.0], ("0", "1", "2")), (["b", None, "a"], ("a", "b"))]
)
@pytest.mark.parametrize("rows_in_group", [1, 100])
def test_classes_of_a_whole_column(tmp_path: Path, labels: list[Any], expected: Any, rows_in_group: int) -> None:
    """With NaN where pandas has an integer column with gaps; read by row groups, whatever the parts."""
    columns = {"image": [png(n) for n in range(3)], "label": labels}
    put(tmp_path, {"t.parquet": parquet(columns, row_group_size=rows_in_group)})
    opened = source("parquet", tmp_path, label="label", captions="{label}", part_size=1)
    assert opened.classes() == expected
    assert [one.label for one in samples(opened).values()] == [expected[-1], expected[0]]
    assert rejects(opened) == [("no_label", "t.parquet:1")]


def test_what_is_no_label(tmp_path: Path) -> None:
    put(tmp_path, {"t.parquet": parquet({"image": [png(1), png(2)], "label": [[1], [2]]})})
    opened = source("parquet", tmp_path, label="label", captions="{label}")
    assert opened.classes() == () and [reason for reason, _ in rejects(opened)] == ["bad_label"] * 2


def test_class_labels_of_hugging_face(tmp_path: Path) -> None:
    """Numbers in the column, their names in the metadata of the schema."""
    features = {"label": {"names": ["cat", "dog", "elk"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": [png(n) for n in range(4)], "label": [1, 0, -1, 3]}).replace_schema_metadata(metadata)
    put(tmp_path, {"t.parquet": parquet_of(table)})
    opened = source("parquet", tmp_path, label="label", captions="{label}")
    assert opened.classes() == ("cat", "dog", "elk")
    assert [(sample.label, sample.captions) for sample in samples(opened).values()] == [
        ("dog", ("dog",)),
        ("cat", ("cat",)),
    ]
    assert rejects(opened) == [("no_label", "t.parquet:2"), ("bad_label", "t.parquet:3")]


def parquet_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_members_of_tars(tmp_path: Path) -> None:
    def sample(key: str, **members: bytes) -> list[tuple[str, bytes]]:
        named = {name.replace("_", "."): content for name, content in members.items()}
        return [(f"{key}.{suffix}", content) for suffix, content in ({"png": png(), "txt": b"x"} | named).items()]

    members = [
        *sample("0", cls=b"2\n", depth_jpg=png(5)),
        *sample("1", cls=b"1", depth_jpg=png(6), edges_png=png(7)),
        *sample("2", cls=b"1"),
        *sample("3", depth_jpg=png(6)),
        *sample("4", cls=b"dog", depth_jpg=png(6)),
    ]
    put(tmp_path, {"a.tar": tar_of(*members)})
    opened = source("webdataset", tmp_path, label="cls", condition="depth")
    assert opened.classes() is None
    assert [(one.label, one.condition) for one in samples(opened).values()] == [("2", png(5)), ("1", png(6))]
    assert rejects(opened) == [
        ("second_image", "a.tar/1.edges.png"),
        ("no_condition", "a.tar/2"),
        ("no_label", "a.tar/3"),
        ("bad_label", "a.tar/4"),
    ]
    named = source("webdataset", tmp_path, label="cls", condition="depth.jpg", classes=["ant", "cat", "dog"])
    assert named.classes() == ("ant", "cat", "dog")
    assert [one.label for one in samples(named).values()] == ["dog", "cat", "dog"]


def test_classes_of_a_mix(tmp_path: Path) -> None:
    put(tmp_path / "a", {"cat/1.png": png(1), "dog/1.png": png(2)})
    put(tmp_path / "b", {"ant/1.png": png(3), "cat/1.png": png(4)})
    put(tmp_path / "c", {"t.tar": tar_of(("1.png", png()), ("1.txt", b"x"), ("1.cls", b"0"))})
    kinds: dict[str, Any] = {
        name: {"kind": "folder", "path": str(tmp_path / name), "label": "folder", "captions": "{label}"}
        for name in "ab"
    }
    cfg = MixConfig.model_validate({"kind": "mix", "sources": kinds})
    opened = open_source(cfg, part_size=10)
    assert opened.classes() == ("ant", "cat", "dog") and declared_classes(cfg) is None and not has_conditions(cfg)
    assert labels(opened)["b-cat_1"] == "cat"
    kinds["c"] = {"kind": "webdataset", "path": str(tmp_path / "c"), "label": "cls"}
    clash = open_source(MixConfig.model_validate({"kind": "mix", "sources": kinds}), part_size=10)
    with pytest.raises(ValueError, match=r"source.sources.c: .* numbers.*source.sources.c.classes"):
        clash.classes()
    kinds["c"]["classes"] = ["eel"]
    named = open_source(MixConfig.model_validate({"kind": "mix", "sources": kinds}), part_size=10)
    assert named.classes() == ("ant", "cat", "dog", "eel") and labels(named)["c-t-1"] == "eel"
