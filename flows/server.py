"""The Prefect server that a run starts for itself where none is configured."""

from __future__ import annotations

import os
import signal
import tempfile

from prefect.settings import get_current_settings


def described() -> str:
    """Which server a run uses."""
    settings = get_current_settings()
    return settings.api.url or f"a local one, with its database in {settings.home}"


def check_home() -> None:
    """Raise ValueError where a server of its own could not keep its database, which it would try for minutes."""
    settings = get_current_settings()
    if settings.api.url is not None:
        return
    try:
        settings.home.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=settings.home).close()
    except OSError as error:
        raise ValueError(
            f"PREFECT_HOME: Prefect cannot write its database in {settings.home} ({error}); set PREFECT_HOME to a "
            f"writable folder (its default is .prefect in HOME, which is {os.environ.get('HOME', 'not set')}), or "
            "PREFECT_API_URL to a server"
        ) from None


def start() -> None:
    """Start a server for this process, unless PREFECT_API_URL names one; it does not hear Ctrl-C."""
    from prefect.server.api.server import SubprocessASGIServer  # takes seconds

    if get_current_settings().api.url is None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; ours alone is to unwind
        SubprocessASGIServer().start()
