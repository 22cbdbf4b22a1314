"""Configuration: what is read, and what a person is told who wrote it wrong (golden messages)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from genpipe import config
from genpipe.config import Config, ConfigError, Location
from genpipe.pipeline.graph import PipelineConfig
from genpipe.stage_config import UNFINGERPRINTED, StageConfig

ROOT = Path(__file__).parent.parent


class Folder(Config):
    kind: Literal["folder"]
    path: str


class Table(Config):
    kind: Literal["table"]
    url: str
    columns: int = 2


class Layers(Config):
    width: int = Field(64, gt=0, multiple_of=8)
    depth: int = 2


class Model(StageConfig):
    samples: int
    source: Annotated[Folder | Table, Field(discriminator="kind")] = Folder(kind="folder", path="data")
    other: Annotated[Folder | Table, Field(discriminator="kind")] | None = None
    layers: Layers = Layers()
    precision: Literal["bf16", "fp32"] = "bf16"
    steps: tuple[int, ...] = (1, 2)
    rate: float = 0.1

    @model_validator(mode="after")
    def _fits(self) -> Model:
        if self.samples % 2:
            raise ValueError(f"samples {self.samples} is odd; choose an even number")
        return self


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def read(path: Path, *overrides: str) -> Model:
    return config.parse(Model, config.load(path, overrides))


def message(path: Path, *overrides: str) -> str:
    """What the user is told, with the path of the file as FILE and of its folder as DIR."""
    with pytest.raises(ConfigError) as error:
        read(path, *overrides)
    return str(error.value).replace(str(path), "FILE").replace(str(path.parent), "DIR")


GOLDEN = {
    "samples: 4\nlayers: {widht: 8}": "FILE: layers.widht: unknown key; did you mean 'width'?",
    "samples: 4\nlayer: {width: 8}": "FILE: layer: unknown key; did you mean 'layers'?",
    "samples: 4\nlayers: {color: red}": "FILE: layers.color: unknown key; known keys: depth, width",
    "samples: 4\nsource: {kind: table, url: x, colums: 3}": (
        "FILE: source.colums: unknown key; did you mean 'columns'?"
    ),
    "samples: 4\nsource: {kind: table, url: x, path: y}": (
        "FILE: source.path: unknown key; known keys: columns, kind, url"
    ),
    "rate: 1": "FILE: samples: this setting is required and has no default; add it",
    "samples: 4\nsource: {kind: table}": ("FILE: source.url: this setting is required and has no default; add it"),
    "samples: many": (
        "FILE: samples: input should be a valid integer, unable to parse string as an integer, got 'many'"
    ),
    "samples: 4\nlayers: {width: 12}": "FILE: layers.width: input should be a multiple of 8, got 12",
    "samples: 4\nlayers: {width: -8}": "FILE: layers.width: input should be greater than 0, got -8",
    "samples: 4\nlayers: 3": "FILE: layers: expected a block of settings here, got 3",
    "samples: 4\nlayers:": "FILE: layers: expected a block of settings here, got None",
    "samples: 4\nprecision: fp16": "FILE: precision: input should be 'bf16' or 'fp32', got 'fp16'",
    "samples: 4\nsource: {kind: foldr, path: x}": ("FILE: source.kind: unknown kind 'foldr'; did you mean 'folder'?"),
    "samples: 4\nsource: {kind: zip, path: x}": (
        "FILE: source.kind: unknown kind 'zip'; known kinds: 'folder', 'table'"
    ),
    "samples: 4\nother: {path: x}": ("FILE: other: has no `kind`, which says what its settings mean; add one"),
    "samples: 4\nsteps: [1, x]": (
        "FILE: steps.1: input should be a valid integer, unable to parse string as an integer, got 'x'"
    ),
    "samples: 3": "FILE: (top level): samples 3 is odd; choose an even number",
    "samples: x\nrtae: 1": (
        "FILE: samples: input should be a valid integer, unable to parse string as an integer, got 'x'\n"
        "FILE: rtae: unknown key; did you mean 'rate'?"
    ),
    "- a list": "FILE: expected a mapping of settings, got list",
    "": "FILE: expected a mapping of settings, got NoneType",
}


@pytest.mark.parametrize("text", GOLDEN)
def test_every_fault_names_file_setting_and_remedy(tmp_path: Path, text: str) -> None:
    assert message(write(tmp_path, "some.yaml", text)) == GOLDEN[text]


def test_broken_yaml_says_where(tmp_path: Path) -> None:
    told = message(write(tmp_path, "some.yaml", "samples: [1, 2\nrate: 1"))
    assert told.startswith("FILE: is not valid YAML: ")
    assert "line 2" in told


def test_a_missing_file_names_its_neighbor(tmp_path: Path) -> None:
    write(tmp_path, "pipeline.yaml", "samples: 4")
    assert message(tmp_path / "pipelin.yaml") == ("FILE: no such configuration file; did you mean DIR/pipeline.yaml?")
    assert message(tmp_path / "other" / "x.yaml") == "FILE: no such configuration file"


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert message(tmp_path).startswith("FILE: cannot be read: ")


def test_base_is_read_first_and_merged_over(tmp_path: Path) -> None:
    write(tmp_path, "bases/root.yaml", "samples: 2\nrate: 0.5\nlayers: {width: 8, depth: 9}")
    write(tmp_path, "bases/layers.yaml", "width: 24")
    path = write(tmp_path, "mine.yaml", "base: bases/root.yaml\nsamples: 4\nlayers: {base: bases/layers.yaml}")
    cfg = read(path)
    assert (cfg.samples, cfg.rate, cfg.layers) == (4, 0.5, Layers(width=24, depth=9))


def test_a_fault_is_blamed_on_the_file_that_holds_it(tmp_path: Path) -> None:
    root = write(tmp_path, "root.yaml", "samples: 2\nlayers: {widht: 8}")
    path = write(tmp_path, "mine.yaml", "base: root.yaml\nrate: fast")
    assert message(path).splitlines() == [
        f"{root}: layers.widht: unknown key; did you mean 'width'?".replace(str(tmp_path), "DIR"),
        "FILE: rate: input should be a valid number, unable to parse string as a number, got 'fast'",
    ]


def test_bases_that_run_in_a_circle(tmp_path: Path) -> None:
    one = write(tmp_path, "one.yaml", "base: sub/two.yaml")
    write(tmp_path, "sub/two.yaml", "base: ../one.yaml")
    told = message(one)
    assert told == ("DIR/sub/../one.yaml: `base` runs in a circle: FILE -> DIR/sub/two.yaml -> DIR/sub/../one.yaml")


def test_a_missing_base_says_who_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "base: root.yaml")
    write(tmp_path, "roots.yaml", "samples: 2")
    assert message(path) == (
        "DIR/root.yaml: no such configuration file (named as base by FILE); did you mean DIR/roots.yaml?"
    )


def test_changing_kind_replaces_the_block(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "samples: 2\nsource: {kind: table, url: x, columns: 7}")
    path = write(tmp_path, "mine.yaml", "base: root.yaml\nsource: {kind: folder, path: here}")
    assert read(path).source == Folder(kind="folder", path="here")
    assert read(path, "source.kind=table", "source.url=y").source == Table(kind="table", url="y")
    assert read(path, "source.kind=folder").source == Folder(kind="folder", path="here"), (
        "the same kind changes nothing"
    )


class Wide(Config):
    layers: Layers = Layers(width=128, depth=5)
    source: Annotated[Folder | Table, Field(discriminator="kind")] = Table(kind="table", url="u", columns=7)


def test_a_block_given_in_part_keeps_the_rest_of_its_default() -> None:
    assert Wide.model_validate({"layers": {"depth": 3}}).layers == Layers(width=128, depth=3)
    assert Wide.model_validate({"source": {"url": "v"}}).source == Table(kind="table", url="v", columns=7)
    assert Wide.model_validate({"source": {"kind": "table", "url": "v"}}).source == Table(
        kind="table", url="v", columns=7
    )
    folder = {"kind": "folder", "path": "p"}
    assert Wide.model_validate({"source": folder}).source == Folder(kind="folder", path="p"), "another kind is all new"


def test_overrides_come_last(tmp_path: Path) -> None:
    path = write(tmp_path, "some.yaml", "samples: 2\nlayers: {width: 8, depth: 3}")
    assert read(path, "layers.width=16", "samples=4", "layers.width=24").layers == Layers(width=24, depth=3)
    assert read(path, "rate=1e-3").rate == 1e-3
    assert read(path, "steps=[4, 5]").steps == (4, 5)
    assert read(path, "layers={depth: 5}").layers == Layers(width=8, depth=5), "a block is merged"
    assert read(path, "source={kind: folder, path: a=b}").source == Folder(kind="folder", path="a=b")


def test_faulty_overrides_are_quoted(tmp_path: Path) -> None:
    path = write(tmp_path, "some.yaml", "samples: 2\nlayers: {width: 8}")
    form = "write it as path=value, e.g. stages.decoder.train.optim.lr=1e-3"
    assert message(path, "layers.width") == f"override 'layers.width': {form}"
    assert message(path, "=3") == f"override '=3': {form}"
    assert message(path, "layers..width=3") == f"override 'layers..width=3': {form}"
    assert message(path, "rate=[").startswith("override 'rate=[': the value is not valid YAML: ")
    assert message(path, "layers.widht=8") == (
        "override 'layers.widht=8': layers.widht: unknown key; did you mean 'width'?"
    )
    assert message(path, "layers={width: 12}") == (
        "override 'layers={width: 12}': layers.width: input should be a multiple of 8, got 12"
    )
    assert message(path, "layers=7") == "override 'layers=7': layers: expected a block of settings here, got 7"
    assert message(path, "source.kind=nil") == (
        "override 'source.kind=nil': source.kind: unknown kind 'nil'; known kinds: 'folder', 'table'"
    )


def test_a_prefix_says_where_the_block_stands(tmp_path: Path) -> None:
    path = write(tmp_path, "some.yaml", "stages: {prior: {samples: 2, rtae: 1}, decoder: 3}")
    tree = config.load(path)
    with pytest.raises(ConfigError) as error:
        config.parse(Model, tree.at("stages", "prior"), prefix="stages.prior")
    assert str(error.value) == f"{path}: stages.prior.rtae: unknown key; did you mean 'rate'?"
    with pytest.raises(ConfigError) as error:
        tree.at("stages", "decoder")
    assert str(error.value) == f"{path}: stages.decoder: expected a block of settings here"


keys = st.text("abcdefgh_", min_size=1, max_size=4)
eighths = st.integers(-(10**6), 10**6).map(lambda n: n / 8)  # YAML 1.1 takes 1e+16, without a point, for text
leaves = st.integers() | st.booleans() | eighths | st.text("xyz ", max_size=5)
trees = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=6)


@given(st.dictionaries(keys, trees, max_size=3), st.lists(keys, min_size=1, max_size=4), leaves)
def test_an_override_is_what_one_reads_back(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], path: list[str], value: Any
) -> None:
    file = write(tmp_path_factory.mktemp("override"), "some.yaml", json.dumps(values))
    text = f"{'.'.join(path)}={json.dumps(value)}"
    tree = config.load(file, [text])
    found: Any = tree.values
    for key in path:
        found = found[key]
    assert found == value
    assert tree.origin_of(tuple(path)) == f"override {text!r}"
    before, after = config.flatten(config.load(file).values), config.flatten(tree.values)
    for key in before.keys() & after.keys() - {".".join(path)}:
        assert after[key] == before[key], "what was not named stays"


json_values = st.recursive(
    st.none() | leaves | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)
)


@given(json_values)
def test_canonical_json_loses_nothing_and_has_one_spelling(value: Any) -> None:
    text = config.canonical_json(value)
    assert json.loads(text) == value
    assert config.canonical_json(json.loads(text)) == text


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        config.canonical_json({"loss": float("nan")})


def test_resolved_holds_every_default_and_nothing_left_out() -> None:
    resolved = config.resolved(Model(samples=2), without=frozenset({"resources"}))
    assert resolved == {
        "samples": 2,
        "source": {"kind": "folder", "path": "data"},
        "other": None,
        "layers": {"width": 64, "depth": 2},
        "precision": "bf16",
        "steps": [1, 2],
        "rate": 0.1,
        "observe": {"gates": {}},
    }
    assert Model.model_validate(resolved) == Model(samples=2)


def test_flatten() -> None:
    assert config.flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


blocks = st.fixed_dictionaries(
    {"samples": st.integers(0, 3).map(lambda n: 2 * n)},
    optional={
        "source": st.one_of(
            st.fixed_dictionaries({"kind": st.just("folder"), "path": st.sampled_from(["data", "more"])}),
            st.fixed_dictionaries(
                {"kind": st.just("table"), "url": st.sampled_from(["data", "x"])},
                optional={"columns": st.integers(1, 3)},
            ),
        ),
        "other": st.one_of(st.none(), st.fixed_dictionaries({"kind": st.just("folder"), "path": st.just("data")})),
        "layers": st.fixed_dictionaries({}, optional={"width": st.sampled_from([64, 128]), "depth": st.integers(1, 3)}),
        "steps": st.lists(st.integers(0, 2), max_size=3),
        "rate": st.sampled_from([0.1, 0.2, 1]),
    },
)


@given(blocks, blocks)
def test_changed_settings_differ_exactly_if_the_configurations_do(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = Model.model_validate(one), Model.model_validate(other)
    assert (config.changed(first) == config.changed(second)) == (first == second)
    assert json.loads(json.dumps(config.changed(first))) == config.changed(first)


def test_changed_settings_leave_defaults_out_and_name_kinds() -> None:
    assert config.changed(Model(samples=2)) == {"samples": 2}
    table = Model.model_validate({"samples": 2, "source": {"kind": "table", "url": "x"}, "layers": {"width": 64}})
    assert config.changed(table) == {"samples": 2, "source": {"kind": "table", "url": "x"}}
    watched = Model.model_validate({"samples": 2, "observe": {"gates": {"psnr": {"min": 20}}}})
    assert config.changed(watched, without=UNFINGERPRINTED) == {"samples": 2}


def test_a_setting_that_is_added_later_changes_nothing() -> None:
    class Later(Model):
        invented: float = 0.5

    assert config.changed(Later(samples=4, rate=0.3)) == config.changed(Model(samples=4, rate=0.3))


class Placed(Config):
    store: Location = "here"
    sources: tuple[Pinned, ...] = ()


class Pinned(Config):
    weights: Location
    sha256: str = ""


Placed.model_rebuild()


def test_locations_are_taken_from_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file from its folder, also in a base; in an override from the working folder; a URI as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    write(tmp_path, "bases/base.yaml", "store: ../runs/x")
    path = write(
        tmp_path, "mine/mine.yaml", "base: ../bases/base.yaml\nsources: [{weights: w.bin}, {weights: ~/w.bin}]"
    )
    tree = config.load(path)
    placed = config.parse(Placed, tree)
    assert placed.store == str(tmp_path / "runs/x")
    assert [s.weights for s in placed.sources] == [str(tmp_path / "mine/w.bin"), "/home/someone/w.bin"]
    assert config.parse(Placed, config.load(path, ["store=out"])).store == str(tmp_path / "out")
    assert config.parse(Placed, config.load(path, ["store=s3://bucket/a"])).store == "s3://bucket/a"


def test_what_is_shipped_is_known_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its bases and the files beside it; what it names otherwise is in the working folder, whose own files win."""
    monkeypatch.chdir(tmp_path)
    shipped = [path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")]
    assert all(config.load(path).values == config.load(ROOT / path).values for path in shipped)
    demo = config.parse(PipelineConfig, config.load("configs/pipeline/demo.yaml"))
    assert demo.store == str(tmp_path / "runs/demo")
    assert Path(demo.curves).samefile(ROOT / "configs/pipeline/demo-curves.json")
    write(tmp_path, "configs/pipeline/demo.yaml", "name: mine")
    assert config.load("configs/pipeline/demo.yaml").values == {"name": "mine"}
    for absent in ("config.py", "configs/../config.py", "pipeline/demo.yaml", "configs/pipeline/absent.yaml"):
        with pytest.raises(ConfigError, match="no such configuration file"):
            config.load(absent)


def test_locations_are_named_by_their_settings() -> None:
    placed = Placed(store="", sources=(Pinned(weights="/a"), Pinned(weights="s3://b/c")))
    assert config.locations(placed) == {"sources.0.weights": "/a", "sources.1.weights": "s3://b/c"}
    assert config.locations(Placed(store="x"), "p.") == {"p.store": "x"}


def test_where_something_lies_is_no_part_of_what_it_is() -> None:
    here, there = (Placed(store=place, sources=(Pinned(weights=place, sha256="ab"),)) for place in ("/a", "/b"))
    assert config.changed(here) == config.changed(there) == {"sources": [{"sha256": "ab"}]}


def test_a_key_that_stands_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "twice.yaml", "samples: 2\nlayers:\n  depth: 1\nsamples: 4\n")
    with pytest.raises(ConfigError) as error:
        read(path)
    assert all(said in str(error.value) for said in (str(path), "'samples'", "line 1", "line 4"))


def test_anchors_and_merges_are_no_repetition(tmp_path: Path) -> None:
    path = write(tmp_path, "merged.yaml", "samples: 2\nlayers: &layers {depth: 3}\nobserve: {}\n")
    assert read(path).layers.depth == 3
    path = write(tmp_path, "more.yaml", "samples: 2\nlayers: {<<: {depth: 3, width: 8}, width: 16}\n")
    assert read(path).layers == Layers(depth=3, width=16)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, "infinite.yaml", f"samples: 2\nrate: {value}\n")
    with pytest.raises(ConfigError) as error:
        read(path)
    assert f"{path}: rate" in str(error.value) and "finite" in str(error.value)


class Texts(Config):
    text: str = ""
    number: float = 0.0
    flag: bool = False
    many: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("text=a #1 fan", Texts(text="a #1 fan")),
        ("text=key: value", Texts(text="key: value")),
        ("text=- item", Texts(text="- item")),
        ("text=*star", Texts(text="*star")),
        ("text='quoted'", Texts(text="quoted")),
        ("text=a=b", Texts(text="a=b")),
        ("number=1e-3", Texts(number=1e-3)),
        ("number=3", Texts(number=3)),
        ("flag=true", Texts(flag=True)),
        ("many=[a, 'b #2']", Texts(many=("a", "b #2"))),
    ],
)
def test_overrides_are_taken_as_they_are_typed(tmp_path: Path, typed: str, meant: Texts) -> None:
    path = write(tmp_path, "texts.yaml", "{}")
    assert config.parse(Texts, config.load(path, [typed])) == meant


def test_a_number_where_text_belongs_is_told_with_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path, "number.yaml", "text: 10\n")
    with pytest.raises(ConfigError) as error:
        config.parse(Texts, config.load(path))
    assert f"{path}: text" in str(error.value) and "quotes" in str(error.value)
