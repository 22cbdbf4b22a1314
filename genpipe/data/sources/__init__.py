"""The sources that genpipe reads, behind one interface: `open_source(cfg).read(part)` yields samples.

A source is told apart by its `kind`. Paths are local or `s3://bucket/prefix`, whose credentials, region and
endpoint come from the usual AWS settings.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from genpipe.data.samples import Reject, Sample, Source
from genpipe.data.sources.emoji import EmojiConfig, EmojiSource
from genpipe.data.sources.folder import FolderConfig, FolderSource
from genpipe.data.sources.mix import MixConfig, MixSource, OneConfig
from genpipe.data.sources.parquet import ParquetConfig, ParquetSource
from genpipe.data.sources.shapes import ShapesConfig, ShapesSource
from genpipe.data.sources.urls import UrlsConfig, UrlsSource
from genpipe.data.sources.webdataset import WebDatasetConfig, WebDatasetSource

__all__ = [
    "EmojiConfig",
    "FolderConfig",
    "MixConfig",
    "ParquetConfig",
    "Reject",
    "Sample",
    "ShapesConfig",
    "Source",
    "SourceConfig",
    "UrlsConfig",
    "WebDatasetConfig",
    "declared_classes",
    "has_conditions",
    "open_source",
]

DRAWN = (EmojiConfig, ShapesConfig)
"""Sources without class labels and conditioning images."""

AnyConfig = OneConfig | MixConfig
SourceConfig = Annotated[AnyConfig, Field(discriminator="kind")]


def declared_classes(cfg: AnyConfig) -> tuple[str, ...] | None:
    """The names of the classes as far as the configuration alone tells: () without labels, None if not at all."""
    labeled = [one for one in _each(cfg) if not isinstance(one, DRAWN) and one.label]
    declared = {one.classes if isinstance(one, WebDatasetConfig) else () for one in labeled}
    if not labeled:
        return ()
    return (declared.pop() or None) if len(declared) == 1 else None


def has_conditions(cfg: AnyConfig) -> bool:
    """Whether every sample of the source has a conditioning image."""
    return all(not isinstance(one, DRAWN) and one.condition != "" for one in _each(cfg))


def _each(cfg: AnyConfig) -> list[OneConfig]:
    return list(cfg.sources.values()) if isinstance(cfg, MixConfig) else [cfg]


def open_source(cfg: AnyConfig, *, part_size: int, setting: str = "source") -> Source:
    """List the source.

    Raises ValueError, naming `setting` and the remedy, if it is missing, may not be read, is empty or has no
    captions; ConnectionError if its storage cannot be reached.
    """
    try:
        return _open(cfg, part_size=part_size, setting=setting)
    except ConnectionError:
        raise
    except OSError as error:
        raise ValueError(f"{setting}.path: {error}") from None


def _open(cfg: AnyConfig, *, part_size: int, setting: str) -> Source:
    match cfg:
        case FolderConfig():
            return FolderSource(cfg, part_size=part_size, setting=setting)
        case WebDatasetConfig():
            return WebDatasetSource(cfg, setting=setting)
        case ParquetConfig():
            return ParquetSource(cfg, part_size=part_size, setting=setting)
        case UrlsConfig():
            return UrlsSource(cfg, part_size=part_size, setting=setting)
        case EmojiConfig():
            return EmojiSource(cfg, part_size=part_size)
        case ShapesConfig():
            return ShapesSource(cfg, part_size=part_size)
        case MixConfig():
            inner = {
                name: open_source(one, part_size=part_size, setting=f"{setting}.sources.{name}")
                for name, one in cfg.sources.items()
            }
            return MixSource(inner)
