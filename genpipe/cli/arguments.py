"""Arguments and options that mean the same to several commands."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

HOST = "127.0.0.1"

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="a pipeline's YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[PATH=VALUE]...", help="settings that replace the file's")
]


def _free(port: int) -> int:
    """Refuse a port that something else listens on."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise typer.BadParameter(f"{port}: {error.strerror}; name another") from None
    return port


Port = Annotated[int, typer.Option(min=1, max=65535, callback=_free, help="of the page on 127.0.0.1")]
