"""`genpipe vary`, `blend`, `edit`, `components`, `signals` and `attack`: what they write, against the Python API's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from genpipe import api

if TYPE_CHECKING:
    from conftest import Command, TinyPipeline


@pytest.fixture(scope="module")
def picture(tiny: TinyPipeline) -> str:
    return str(sorted(tiny.shapes.glob("*.png"))[0])


def test_variations_are_written_beside_one_another(
    genpipe: Command, tiny: TinyPipeline, picture: str, tmp_path: Path
) -> None:
    uri, out = tiny.run("system").uri, tmp_path / "row.png"
    code, said, error = genpipe("vary", uri, picture, "--each", "2", "--eta", "0.5", "--seed", "3", "--out", str(out))
    assert code == 0 and str(out) in said, error
    expected = api.load(uri).vary(picture, eta=0.5, each=2, seed=3)
    row = np.asarray(Image.open(out))
    assert row.shape == (32, 2 * 32 + 6, 3)
    assert np.array_equal(row[:, :32], np.asarray(expected[0])) and np.array_equal(
        row[:, -32:], np.asarray(expected[1])
    )


def test_an_end_of_a_blend_is_a_file_or_a_caption(
    genpipe: Command, tiny: TinyPipeline, picture: str, tmp_path: Path
) -> None:
    uri, out = tiny.run("system").uri, tmp_path / "between"
    code, said, error = genpipe("blend", uri, picture, "a large blue bar", "--count", "3", "--out", str(out))
    assert code == 0 and "3 pictures" in said, error
    assert sorted(path.name for path in out.iterdir()) == [*(f"0000{i}.png" for i in range(3)), "grid.png"]
    expected = api.load(uri).blend(Path(picture), "a large blue bar", count=3)
    for i, one in enumerate(expected):
        found = Image.open(out / f"0000{i}.png")
        assert np.array_equal(np.asarray(found), np.asarray(one)) and found.info["use"] == "blend"


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (("--strength", "0.5"), (32, 32)),
        (("--mask", "MASK", "--negative", "a large green cross"), (32, 32)),
        (("--extend", "0,0,10,6"), (42, 38)),
        (("--before", "a small red circle"), (5 * 38 - 6, 32)),
    ],
)
def test_a_picture_is_edited_in_each_way(
    genpipe: Command,
    tiny: TinyPipeline,
    picture: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    size: tuple[int, int],
) -> None:
    mask, out = tmp_path / "mask.png", tmp_path / "out.png"
    Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), 10)).save(mask)
    arguments = tuple(str(mask) if argument == "MASK" else argument for argument in arguments)
    code, _, error = genpipe(
        "edit", tiny.run("system").uri, picture, "a large blue bar", *arguments, "--steps", "3", "--out", str(out)
    )
    assert code == 0, error
    made = Image.open(out)
    assert made.size == size and ("use" in made.info) == (arguments[0] != "--before"), "one picture says what it is"


def test_components_are_found_in_other_pictures(
    genpipe: Command, tiny: TinyPipeline, picture: str, tmp_path: Path
) -> None:
    others, out = [str(path) for path in sorted(tiny.shapes.glob("*.png"))[:20]], tmp_path / "components.png"
    arguments = (picture, *others, "--keep", "1", "--keep", "8", "--out", str(out))
    code, _, error = genpipe("components", tiny.run("system").uri, *arguments)
    assert code == 0 and Image.open(out).size == (2 * 38 - 6, 32), error


def test_the_decoders_signals_are_drawn_as_a_figure(genpipe: Command, tiny: TinyPipeline, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "signals.png"
    code, _, error = genpipe("signals", tiny.run("system").uri, "a red circle", "a blue bar", "--out", str(out))
    assert code == 0 and Image.open(out).width > 4 * 32, error
    code, _, error = genpipe("signals", tiny.run("system").uri, "a red circle", "--out", str(tmp_path))
    assert code == 2 and "name a .png file" in error


def test_what_an_attack_came_to_is_said_and_drawn(
    genpipe: Command, tiny: TinyPipeline, picture: str, tmp_path: Path
) -> None:
    uri, out = tiny.run("system").uri, tmp_path / "attack.png"
    arguments = (picture, "circle", "bar", "--caption", "a small red {}", "--each", "2", "--out", str(out))
    code, said, error = genpipe("attack", uri, *arguments)
    assert code == 0 and Image.open(out).width > 3 * 32, error
    expected = api.load(uri).attack(picture, ["circle", "bar"], caption="a small red {}", each=2)
    for attacked in expected:
        shares = [f"{share:.3f}" for share in attacked.probabilities.values()]
        assert [attacked.words or "nothing", *shares] in [line.split() for line in said.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("attack", "bar"), ("labels: name what the picture shows",)),
        (("attack", "bar", "cross", "--caption", "a bar"), ("caption: 'a bar'",)),
        (("edit", "a bar"), ("say how", "--strength", "--before")),
        (("edit", "a bar", "--strength", "0.5", "--transparent"), ("say how",)),
        (("edit", "a bar", "--extend", "5"), ("--extend 5", "four numbers")),
        (("edit", "a bar", "--before", "a cross", "--each", "2"), ("--before", "--each")),
        (("edit", "a bar", "--strength", "2"), ("strength lies between",)),
        (("edit", "--strength", "0.5"), ("prompts", "required")),
        (("blend", "absent.png"), ("absent.png", "cannot be read")),
        (("vary", "--out", "row.jpg"), ("--out row.jpg", ".png")),
        (("components",), ("give pictures",)),
    ],
)
def test_each_mistake_is_named_and_nothing_written(
    genpipe: Command,
    tiny: TinyPipeline,
    picture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    named: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    code, _, error = genpipe(command, tiny.run("system").uri, picture, *rest)
    assert code == 2 and all(part in error for part in named), error
    assert not list(tmp_path.iterdir())
