"""The reference of the command line, held against what each command says of itself."""

from __future__ import annotations

import re

import pytest
from commands import command_page
from typer.testing import CliRunner

from genpipe.cli.main import app

COMMANDS = re.findall(r"^## genpipe ?(.*)$", command_page(), re.MULTILINE)


def section(command: str) -> str:
    heading = f"## genpipe {command}".rstrip()
    return command_page().split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]


def help_of(command: str) -> str:
    done = CliRunner().invoke(
        app, [*command.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )
    assert done.exit_code == 0, done.output
    return done.output


def test_every_command_is_there() -> None:
    listed = re.findall(r"^│ ([a-z]+) ", help_of("").split("Commands")[1], re.MULTILINE)
    inner = re.findall(r"^│ ([a-z]+) ", help_of("data").split("Commands")[1], re.MULTILINE)
    assert set(COMMANDS) == {"", *listed, *(f"data {name}" for name in inner)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_there(command: str) -> None:
    said = set(re.findall(r"^│ \*? *(--[a-z-]+)", help_of(command), re.MULTILINE)) - {"--help"}
    assert set(re.findall(r"^\| `(--[a-z-]+)", section(command), re.MULTILINE)) == said


def test_arguments_types_and_defaults_are_told() -> None:
    sample = section("sample")
    assert "genpipe sample SOURCE [PROMPT]... [OPTION]..." in sample
    assert "| `[PROMPT]...` | what to draw |" in sample
    assert re.search(r"\| `--each` \| int \| `4` \|", sample) and re.search(r"\| `--steps` \| int \|  \|", sample)
    assert re.search(r"\| `--machine` \| `cpu` or `gpu` \|  \|", section("init"))
    assert re.search(r"\| `--keys` \| str \| \*required\* \|", section("data remove"))
