"""Unseen combinations: held-out samples of groups that others are trained on, as a subject seen in another style only.

How many samples a group has is known when all parts are there. So a part writes the samples of the groups that may
give one up twice, for training and for the held-out split, and a table of them beside its shards; the tables of all
parts together say which of the two indexes each sample leaves. Its other copy stays in the tar unread.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from genpipe.data.shards import write_table
from genpipe.storage import Storage

MEMBER_SCHEMA = pa.schema([(name, pa.string()) for name in ("group", "key", "train", "combinations")])


class Member(NamedTuple):
    """A sample of a group that may give one up: its key, and the shards of both splits that it was written to."""

    group: str
    key: str
    train: str
    combinations: str


def write_members(folder: Path, members: Sequence[Member], *, part: int) -> None:
    """A part's table, `groups-PART.parquet`; written also when it is empty."""
    table = pa.Table.from_pylist([member._asdict() for member in members], MEMBER_SCHEMA)
    write_table(table, folder / members_file(part))


def members_file(part: int) -> str:
    """The name of a part's table."""
    return f"groups-{part:05d}.parquet"


def is_members_file(path: str) -> bool:
    """Whether it is the table of some part."""
    return path.startswith("groups-")


def read_members(made: Storage, paths: Iterable[str]) -> Iterator[Member]:
    """What these tables hold, in their order."""
    for path in paths:
        for row in pq.read_table(io.BytesIO(made.read(path))).to_pylist():
            yield Member(**row)


def leaving(members: Iterable[Member], *, without: Collection[tuple[str, str]], seed: int) -> Iterator[tuple[str, str]]:
    """The shard and key of each copy that leaves its index, so that every sample stays in one of its two.

    Of each group with two samples or more one is held out, by the hashes of their keys, so that neither the order nor
    the parts that they come in matter; a sample that is alone is trained on. `without` names the duplicates, which
    leave their training shard (by it and their key they are named) anyway: they leave the other one too. In memory
    is what the tables hold.
    """
    groups: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        if (member.train, member.key) in without:
            yield member.combinations, member.key
        else:
            groups[member.group].append(member)
    for group, of_group in groups.items():
        first = min(of_group, key=lambda member: (_hash(f"{seed}/{group}/{member.key}"), member.train))
        held_out = first if len(of_group) > 1 else None
        for member in of_group:
            yield (member.train if member is held_out else member.combinations), member.key


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
