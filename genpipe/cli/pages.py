"""The port of a command that serves a page on this machine."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

HOST = "127.0.0.1"


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


def listens(port: int) -> bool:
    """Whether a server takes connections there."""
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0
