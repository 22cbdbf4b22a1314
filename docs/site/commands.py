"""The reference of the command line, written from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer.main
from settings import marked, type_name

from genpipe.cli.main import app


def command_page() -> str:
    """Every command with its arguments and options."""
    program = typer.main.get_command(app)
    sections = [_section(name, command) for name, command in _commands(program, "genpipe")]
    return (
        "\n\n".join(["# Commands", "Every command tells this of itself: `genpipe COMMAND --help`.", *sections]) + "\n"
    )


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for inner in getattr(command, "commands", {}).values():
        yield from _commands(inner, f"{name} {inner.name}")


def _section(name: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    words = [name, *(each.metavar for each in arguments), *(["[OPTION]..."] if options else [])]
    words += ["COMMAND ..."] if hasattr(command, "commands") else []
    lines = [f"## {name}", f"    {' '.join(words)}", inspect.cleandoc(command.help)]
    if arguments:
        rows = [f"| `{each.metavar}` | {marked(each.help or '')} |" for each in arguments]
        lines.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    if options:
        lines.append("\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *map(_option, options)]))
    return "\n\n".join(lines)


def _option(option: Any) -> str:
    flag = option.is_flag
    kind = "flag" if flag else type_name(option.type_descriptor.annotation).removesuffix(" or `null`")
    default = "" if flag or option.default in (None, "") else f"`{option.default}`"
    default = "*required*" if option.required else default
    return f"| `{', '.join(option.opts)}` | {kind} | {default} | {marked(option.help or '')} |"
