"""Files of this machine that are whole or absent, locks between processes, and what to do when its disk is full."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".part"
"""How the name of a file ends that is not whole yet."""

FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """There is no room for what is to be written, at `where`."""

    def __init__(self, where: str) -> None:
        self.where = where
        super().__init__(
            f"{where}: no space left; make room there, then give the same command again, which goes on from what was "
            "finished"
        )


def may_pass(error: OSError) -> bool:
    """Whether what a storage does not do now it may do soon: it is away, full, or its device has trouble."""
    passing = (ConnectionError, TimeoutError, DiskFull)
    return isinstance(error, passing) or error.errno in (errno.EIO, *FULL)


@contextmanager
def telling_full(where: str = "") -> Iterator[None]:
    """Raise DiskFull in the place of an OSError of the block that says so, naming `where` or the error's own file."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(where or error.filename or f"a disk of this machine ({tempfile.gettempdir()}?)") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well."""
    with beside(path) as temporary:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, gone when the block ends."""
    with telling_full(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=TEMPORARY)
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`, a file that stays there, in the block: one process or thread of this machine at a time.

    It is given back when its holder dies. Raises OSError where the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                f"{path}: cannot be locked ({error.strerror}); set GENPIPE_CACHE to a folder on a disk of this machine"
            ) from error
        yield


def write_through(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def link(source: Path, target: Path) -> None:
    """Give a file a second name unless that is taken (FileExistsError): atomic on NFS too, and whole at once."""
    source.chmod(0o644)
    try:
        os.link(source, target)
    except FileExistsError:
        if not _same_file(source, target):  # an NFS server may have made the link and lost its answer
            raise
    except OSError:  # a file system without links: whole at once only for readers that know what to expect
        with target.open("xb") as file:
            file.write(source.read_bytes())


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False
