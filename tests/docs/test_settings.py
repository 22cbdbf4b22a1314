"""The reference of settings is whole, as pydantic's own schema of the same models says, and each has a meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from posixpath import dirname, join, normpath
from typing import Annotated, Any, Literal

import pytest
import settings
from pydantic import Field

from genpipe.config import Config, Location
from genpipe.pipeline.graph import PipelineConfig
from genpipe.stages import load_stage, stage_kinds

MODELS = {"pipeline.md": PipelineConfig, **{f"stages/{kind}.md": load_stage(kind).Config for kind in stage_kinds()}}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return settings.setting_pages()


def definitions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every block of every stage by the name of its class, as JSON schema."""
    for model in MODELS.values():
        yield from model.model_json_schema().get("$defs", {}).items()


def section(page: str, name: str) -> str:
    """What stands on a page below the heading with the anchor `name`."""
    return page.split(f"{{ #{name} }}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> set[str]:
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_every_setting_has_a_meaning() -> None:
    """A `description` of its own, or that of the field which it overrides, or the docstring of the block that it is."""
    missing = [
        f"{block.__module__}.{block.__name__}.{name}"
        for block in settings.blocks()
        for name in block.model_fields
        if not (name == "kind" and settings.kind_of(block)) and not settings.description(block, name)
    ]
    assert not missing, "give these a Field(description=...)"


def test_a_setting_without_a_meaning_is_found() -> None:
    class Said(Config):
        size: int = Field(1, description="in pixels")

    class Overridden(Said):
        size: int = 2

    class Bare(Config):
        """A block."""

        size: int = 1

    class Holder(Config):
        one: Bare | None = None

    assert settings.description(Overridden, "size") == "in pixels"
    assert settings.description(Bare, "size") == ""
    assert settings.description(Holder, "one") == "a block"


def test_every_setting_of_every_stage_is_in_the_reference(pages: dict[str, str]) -> None:
    for path, model in MODELS.items():
        assert rows(section(pages[path], model.__name__)) == set(model.model_json_schema()["properties"]) - {"kind"}
    named = {anchor: page for page in pages.values() for anchor in re.findall(r"\{ #(\w+) \}", page)}
    for name, schema in definitions():
        properties = schema.get("properties", {})
        told = {field for field, each in properties.items() if "const" not in each}
        assert rows(section(named[name], name)) == told, name


def test_links_lead_to_sections_that_are_there(pages: dict[str, str]) -> None:
    links = 0
    for path, page in pages.items():
        for target, anchor in re.findall(r"\]\(([^)#]*)#(\w+)\)", page):
            place = normpath(join(dirname(path), target)) if target else path
            if place in pages:  # the others are pages that people write, which MkDocs checks
                links += 1
                assert f"{{ #{anchor} }}" in pages[place], f"{path}: {target}#{anchor}"
    assert links > 100


class Cube(Config):
    """A cube | a *box*."""

    kind: Literal["cube"] = "cube"
    side: int = Field(2, ge=1, description="in [cm]")


class Example(Config):
    """All sorts of settings."""

    count: int = Field(ge=1, lt=10, description="how many")
    share: float | None = Field(None, gt=0, description="of all")
    mode: Literal["a", "b"] = Field("a", description="a or b")
    sides: tuple[Annotated[int, Field(gt=0)], ...] = Field((1, 2), min_length=1, description="each")
    span: tuple[float, float] = Field((0.0, 1.0), description="from, to")
    path: Location = Field("", description="a file")
    cube: Cube = Field(Cube(side=3), description="a cube")
    extra: dict[str, Any] = Field(default_factory=dict, description="more")


def test_types_bounds_and_defaults_are_those_that_people_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.PAGES, "here", ("", "", (__name__,)))
    table = settings._table(Example, page="here.md").split("\n")[2:]
    assert table == [
        "| `count` | int, ≥ 1, &lt; 10 | *required* | how many |",
        "| `share` | float or `null`, &gt; 0 | `null` | of all |",
        "| `mode` | `a` or `b` | `a` | a or b |",
        "| `sides` | list of int &gt; 0, at least 1 | `[1, 2]` | each |",
        "| `span` | \\[float, float\\] | `[0.0, 1.0]` | from, to |",
        '| `path` | path | `""` | a file |',
        "| `cube` | [cube](#Cube) | `{kind: cube, side: 3}` | a cube |",
        "| `extra` | mapping of names to anything | `{}` | more |",
    ]
    assert settings._row(Cube, "side", page="here.md").endswith("| in \\[cm\\] |")


def test_a_block_of_a_module_without_a_page_is_named() -> None:
    with pytest.raises(ValueError, match=r"no page for .*test_settings\.Cube; add its module to PAGES"):
        settings._table(Example, page="here.md")
