"""Several sources as one dataset, each sample marked with the name of its source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from genpipe.config import Config
from genpipe.data.classes import class_names
from genpipe.data.samples import Reject, Sample, Source
from genpipe.data.sources.emoji import EmojiConfig
from genpipe.data.sources.folder import FolderConfig
from genpipe.data.sources.parquet import ParquetConfig
from genpipe.data.sources.shapes import ShapesConfig
from genpipe.data.sources.urls import UrlsConfig
from genpipe.data.sources.webdataset import WebDatasetConfig

OneConfig = FolderConfig | WebDatasetConfig | ParquetConfig | UrlsConfig | EmojiConfig | ShapesConfig
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+$", max_length=40)]


class MixConfig(Config):
    """Named sources. How often training sees each is a setting of training, so that shards serve any weights."""

    kind: Literal["mix"]
    sources: dict[Name, Annotated[OneConfig, Field(discriminator="kind")]] = Field(
        min_length=1, description="by name; any kind but `mix`"
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _refuse_mixes(cls, sources: Any) -> Any:
        for name, source in sources.items() if isinstance(sources, Mapping) else ():
            if isinstance(source, Mapping) and source.get("kind") == "mix":
                raise ValueError(f"{name} is itself a mix; list its sources here, beside the others")
        return sources


class MixSource:
    """The parts of each source in the order of their names, the source's name before each key and group."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        # By name: a resolved configuration is stored with sorted keys.
        self.sources = dict(sorted(sources.items()))

    def parts(self) -> list[str]:
        """`photos/00000`, ...: those of a source stand together."""
        return [f"{name}/{part}" for name, source in self.sources.items() for part in source.parts()]

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """A part of one source: keys `{name}-{key}`, groups `{name}/{group}`, rejects' places `{name}/{source}`."""
        name, _, inner = part.partition("/")
        for item in self.sources[name].read(inner):
            key = f"{name}-{item.key}" if item.key else ""
            if isinstance(item, Reject):
                yield replace(item, key=key, source=f"{name}/{item.source}")
            else:
                yield replace(item, key=key, group=f"{name}/{item.group}", source=name)

    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes of all sources: those of the same name are one class.

        Raises ValueError where some are known by name and others only by number.
        """
        known = {name: source.classes() for name, source in self.sources.items()}
        if None not in known.values():
            return class_names(label for labels in known.values() for label in labels or ())
        if named := [name for name, labels in known.items() if labels]:
            numbered = next(name for name, labels in known.items() if labels is None)
            raise ValueError(
                f"source.sources.{numbered}: its classes are numbers, those of {named[0]} have names; list the names "
                f"in source.sources.{numbered}.classes"
            )
        return None

    def digest(self) -> str:
        """sha256 over the sources' names and digests."""
        lines = (f"{name} {source.digest()}\n" for name, source in self.sources.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()
