"""The files of a source: listed in a folder or under `s3://`, given stable keys, and read ahead in order."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TypeVar

from braceexpand import braceexpand

from genpipe.data.prefetch import prefetched
from genpipe.storage import Entry, Storage, local_path, open_storage

T = TypeVar("T")
R = TypeVar("R")
# What counts as an image by its name. Whether it can be read is for the stage to decide: a file of a rare kind is a
# reject at worst, and never overlooked.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})
MAX_KEY_LENGTH = 150
MAX_FILE_BYTES = 2**28  # no photograph is larger, and a part must fit into memory
READ_THREADS = 16  # reads under way at once from a remote storage


def list_files(path: str, *, suffixes: Collection[str], setting: str, what: str) -> tuple[Storage, list[Entry]]:
    """The storage that `path` lies in and its files with one of `suffixes`, in the order of their names.

    `path` is a file, a folder with its subfolders, or a pattern with `*`, `?`, `[...]` (within one folder) and
    braces (`{00000..00123}.tar`, each of which must be there); local, where `~` is expanded, or `s3://`. Hidden
    files and folders are left out. Raises ValueError, naming `setting` and the remedy, if there are none, and for
    one that is compressed: it has no places that a part could start at.
    """
    path = path if "://" in path else os.path.expanduser(path)
    kinds = ", ".join(sorted(suffixes))
    if re.search(r"[*?\[{]", path) and not os.path.exists(path):
        storage, entries = _list_matching(path, setting=setting, what=what)
    else:
        storage, entries = _list_under(path, setting=setting, what=what)
    entries = [entry for entry in entries if not is_hidden(entry.key)]
    if packed := sorted(entry.key for entry in entries if suffix_of(_unpacked(entry.key)) in suffixes):
        raise ValueError(f"{setting}: {packed[0]} in {path} is compressed ({len(packed)} in all); unpack it, or narrow "
                         "the path")  # fmt: skip
    entries = [entry for entry in entries if suffix_of(entry.key) in suffixes]
    if not entries:
        raise ValueError(
            f"{setting}: no {what} in {path} (looked for {kinds}); give the folder, file or pattern of them"
        )
    if unclean := [entry.key for entry in entries if not is_text(entry.key)]:
        raise ValueError(f"{setting}: the name {unclean[0]!a} in {path} is not UTF-8; rename the file")
    return storage, sorted(entries)


def blames_storage(error: OSError, *, storage: Storage) -> bool:
    """Whether a remote service is to blame for a failed read: that must stop the part rather than fill the ledger."""
    is_remote = local_path(storage.uri) is None
    return isinstance(error, ConnectionError) or (is_remote and isinstance(error, PermissionError))


def part_names(count: int) -> list[str]:
    """`00000`, `00001`, ..."""
    return [f"{number:05d}" for number in range(count)]


def read_ahead(read: Callable[[T], R], items: Iterable[T], *, storage: Storage) -> Iterator[R]:
    """`map(read, items)`, by threads if the storage is remote, where each read waits for the network."""
    threads = READ_THREADS if local_path(storage.uri) is None else 0
    for _, result in prefetched(read, items, threads=threads, ahead=2 * READ_THREADS):
        yield result


def member_key(name: str) -> str:
    """`name` as a key of a sample; one with other characters, or too long, is cleaned and gets a hash of the name."""
    key = _plain(name)
    return key if key == name else f"{key}-{_hash(name)}"


def unique_keys(names: list[str], *, dashes: bool = True) -> dict[str, str]:
    """A key for each file name, without its suffix; names that clash (a.jpg, a.png) get a hash of the name.

    Without `dashes`, the keys have none, so that one can separate them from what follows.
    """
    dash = "-" if dashes else "_"
    plain = {name: _plain(os.path.splitext(name)[0]).replace("-", dash) for name in names}
    count = Counter(plain.values())
    return {name: key if count[key] == 1 else f"{key}{dash}{_hash(name)}" for name, key in plain.items()}


def is_hidden(name: str) -> bool:
    """Whether a file or one of its folders starts with a dot."""
    return name.startswith(".") or "/." in name


def is_text(name: str) -> bool:
    """Whether a name can stand in a table or archive: bytes that are not UTF-8 come as lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def suffix_of(name: str) -> str:
    """The lower-case suffix of a file name, with its dot."""
    return os.path.splitext(name)[1].lower()


def _unpacked(name: str) -> str:
    """What a compressed file is called when it is unpacked, "" for any other."""
    stem, suffix = os.path.splitext(name.lower())
    return stem if suffix in COMPRESSED else f"{stem}.tar" if suffix == ".tgz" else ""


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_KEY_LENGTH]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _list_under(path: str, *, setting: str, what: str) -> tuple[Storage, list[Entry]]:
    """A file alone, or everything under a folder."""
    folder, _, name = path.rstrip("/").rpartition("/")
    is_remote = "://" in path
    if name and not (is_remote and folder == "s3:/"):
        storage = open_storage(folder or ("/" if path.startswith("/") else "."))
        try:
            return storage, [storage.stat(name)]
        except (FileNotFoundError, NotADirectoryError):
            pass
    if not is_remote and not os.path.isdir(path):
        raise ValueError(f"{setting}: {path} does not exist; give the folder, file or pattern of the {what}")
    storage = open_storage(path)
    return storage, list(storage.list())


def _list_matching(path: str, *, setting: str, what: str) -> tuple[Storage, list[Entry]]:
    fixed = re.split(r"[*?\[{]", path, maxsplit=1)[0]
    root, _, start = fixed.rpartition("/")
    try:
        patterns = list(braceexpand(path[len(fixed) - len(start) :]))
    except ValueError:
        raise ValueError(f"{setting}: {path} has an unmatched brace; write it as {{00000..00123}}.tar") from None
    storage = open_storage(root or ("/" if path.startswith("/") else "."))
    entries = {entry.key: entry for entry in storage.list(start)}
    matching = {pattern: _matching(pattern, entries) for pattern in patterns}
    missing = [pattern for pattern, names in matching.items() if not names]
    if missing and len(missing) < len(patterns):
        raise ValueError(
            f"{setting}: {path} names {what} that do not exist ({len(missing)} of {len(patterns)}, the first is "
            f"{missing[0]}); add them, or narrow the pattern"
        )
    return storage, [entries[name] for name in {name for names in matching.values() for name in names}]


def _matching(pattern: str, names: Collection[str]) -> list[str]:
    if not re.search(r"[*?\[]", pattern):  # of which braces make thousands
        return [pattern] if pattern in names else []
    folders = pattern.split("/")
    split = ((name, name.split("/")) for name in names)
    return [name for name, at in split if len(at) == len(folders) and all(map(fnmatchcase, at, folders))]
