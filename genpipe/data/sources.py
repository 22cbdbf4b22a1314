"""The sources that genpipe reads, behind one interface: `open_source(cfg).read(part)` yields samples."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from genpipe.data.emoji import EmojiConfig, EmojiSource
from genpipe.data.folder import FolderConfig, FolderSource
from genpipe.data.samples import Reject, Sample, Source

__all__ = ["EmojiConfig", "FolderConfig", "Reject", "Sample", "Source", "SourceConfig", "open_source"]

SourceConfig = Annotated[FolderConfig | EmojiConfig, Field(discriminator="kind")]


def open_source(cfg: FolderConfig | EmojiConfig, *, part_size: int) -> Source:
    """List the source. Raises ValueError, with the remedy, if it is missing, empty or without captions."""
    if isinstance(cfg, FolderConfig):
        return FolderSource(cfg, part_size=part_size)
    return EmojiSource(cfg, part_size=part_size)
