"""The values of single pictures behind the numbers of metrics, so that two systems can be compared picture by picture.

They lie in the scores artifact as parquet files `per_sample/*.parquet`, all of one schema, which pandas reads as one
table: `pandas.read_parquet("SCORES/per_sample")`. The files of a metric under a name of its own are below that name.

N values of a number, C prompts.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genpipe.artifacts import Artifact, read_manifest
from genpipe.storage import Storage, at_once, open_storage

FOLDER = "per_sample/"
SCHEMA = pa.schema(
    [
        ("number", pa.string()),  # as the metric calls it: train/recall_at_10
        ("better", pa.string()),  # higher or lower
        ("key", pa.string()),  # the prompt; of real pictures the sample's key
        ("row", pa.int64()),  # the picture's place among those of its split
        ("seed", pa.int64()),  # that it was drawn with; null for what was not drawn
        ("value", pa.float64()),  # their mean is the number
    ]
)
Better = Literal["higher", "lower"]


@runtime_checkable
class PerSample(Protocol):
    """A metric some of whose numbers are means over pictures: it keeps the values, too."""

    def per_sample(self) -> dict[str, Better]:
        """Those numbers, as far as they are known before, and what is better of each."""
        ...


@dataclass(frozen=True)
class Values:
    """The values of one number, float64 [N], in the order of the pictures, and the prompt of each, [N].

    `rows` are the pictures' places among those of their split, [N].
    """

    better: Better
    keys: Sequence[str]
    seeds: frozenset[int]
    values: np.ndarray
    rows: Sequence[int] = ()

    @cached_property
    def pictures(self) -> dict[tuple[str, int], float]:
        """The values by prompt and number: that of a prompt's first picture is 0."""
        seen: dict[str, int] = {}
        found: dict[tuple[str, int], float] = {}
        for key, value in zip(self.keys, self.values.tolist(), strict=True):
            number = seen[key] = seen.get(key, -1) + 1
            found[key, number] = value
        return found


def write_values(
    out: Path,
    name: str,
    values: Mapping[str, np.ndarray],
    *,
    better: Mapping[str, Better],
    keys: Sequence[str],
    rows: Iterable[int],
    seed: int | None,
) -> None:
    """Write values [N] of some numbers, of the same pictures, below a metric's folder `out`.

    `name` is given to no other file of the artifact; `better` has all the numbers of `values`.
    """
    (folder := out / FOLDER).mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    tables = [
        pa.table(
            {
                "number": [number] * len(rows),
                "better": [better[number]] * len(rows),
                "key": keys,
                "row": rows,
                "seed": [seed] * len(rows),
                "value": np.asarray(of, np.float64),
            },
            schema=SCHEMA,
        )
        for number, of in values.items()
    ]
    pq.write_table(pa.concat_tables(tables), folder / f"{name}.parquet")


def read_values(scores: Artifact | str, numbers: Iterable[str] | None = None) -> dict[str, Values]:
    """The values of a committed scores artifact by number, of some or of all. Raises ValueError if it is gone."""
    uri = scores if isinstance(scores, str) else scores.uri
    manifest = read_manifest(uri, check_files=False)
    if manifest is None:
        raise ValueError(f"{uri}: no scores are committed here (any more)")
    return values_of([(open_storage(uri), file.path) for file in manifest.files], numbers)


def values_of(files: Iterable[tuple[Storage, str]], numbers: Iterable[str] | None = None) -> dict[str, Values]:
    """The values in those of some files that hold some, by number; `numbers` limits it to these."""
    wanted = None if numbers is None else set(numbers)
    there = [(storage, key) for storage, key in files if _is_one(key)]
    tables = at_once(lambda place: _read(*place, wanted), there) if there else []
    return dict(_by_number(pa.concat_tables(tables))) if tables else {}


def _is_one(key: str) -> bool:
    return key.endswith(".parquet") and (key.startswith(FOLDER) or f"/{FOLDER}" in key)


def _read(storage: Storage, key: str, wanted: set[str] | None) -> pa.Table:
    """A file's rows, the numbers with the metric's own name before them."""
    table = pq.read_table(io.BytesIO(storage.read(key)), schema=SCHEMA)
    prefix = key[: key.rindex(FOLDER)]
    table = table.set_column(0, "number", pc.binary_join_element_wise(prefix, table["number"], ""))
    return table if wanted is None else table.filter(pc.is_in(table["number"], pa.array(sorted(wanted), pa.string())))


def _by_number(table: pa.Table) -> Iterator[tuple[str, Values]]:
    for number in table["number"].unique().to_pylist():
        own = table.filter(pc.equal(table["number"], number)).sort_by("row")
        seeds = frozenset(own["seed"].drop_null().unique().to_pylist())
        better, keys, rows = own["better"][0].as_py(), own["key"].to_pylist(), own["row"].to_pylist()
        yield number, Values(better, keys, seeds, own["value"].to_numpy(), rows)
