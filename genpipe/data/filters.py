"""Filters: images, captions and whole samples that are left out of the shards although they could be read."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from genpipe.config import WHERE, Config
from genpipe.storage import read_file

MAX_DISTANCE = 12


class FilterConfig(Config):
    """Each filter is off until it is set. Words are what spaces separate: count characters where a script has none."""

    min_side: int | None = Field(None, ge=1, description="pixels of the shorter side of the source's image")
    max_aspect: float | None = Field(None, ge=1, description="longer side / shorter side of the source's image")
    min_caption_chars: int | None = Field(None, ge=1, description="characters; shorter captions are dropped")
    max_caption_chars: int | None = Field(None, ge=1, description="characters; longer captions are dropped")
    min_caption_words: int | None = Field(None, ge=1, description="words; shorter captions are dropped")
    max_caption_words: int | None = Field(None, ge=1, description="words; longer captions are dropped")
    junk_captions: bool = Field(False, description="drop captions that are an address, a file name, hardly any "
                                                   "letters, or one word repeated")  # fmt: skip
    exact_duplicates: bool = Field(False, description="keep the first of the images with the same bytes")
    near_duplicates: int | None = Field(
        None,
        ge=0,
        le=MAX_DISTANCE,
        description="keep the first of the images whose 64-bit perceptual hashes differ in at most this many bits; "
        "4 finds copies that were resized or compressed again, beyond 8 different images meet; colors do not count",
    )
    blocklist: Annotated[str | None, WHERE] = Field(
        None,
        description="a file, local or s3://, with a key or a sha256 (of an image file) per line; # begins a comment",
    )

    @model_validator(mode="after")
    def _limits_leave_something(self) -> Self:
        for what in ("chars", "words"):
            least, most = getattr(self, f"min_caption_{what}"), getattr(self, f"max_caption_{what}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_caption_{what} {least} is more than max_caption_{what} {most}; change one")
        return self

    @property
    def finds_duplicates(self) -> bool:
        """Whether any filter compares images with one another."""
        return self.exact_duplicates or self.near_duplicates is not None


class Filtered(Exception):
    """A sample or caption that a filter leaves out. `reason` is a short code, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check_size(cfg: FilterConfig, *, height: int, width: int) -> None:
    """Raise Filtered (too_small or aspect) for the size in pixels of an upright image."""
    if cfg.min_side is not None and min(height, width) < cfg.min_side:
        raise Filtered("too_small", f"{width} x {height}: the shorter side is below {cfg.min_side}")
    if cfg.max_aspect is not None and max(height, width) > cfg.max_aspect * min(height, width):
        raise Filtered("aspect", f"{width} x {height}: the aspect is beyond {cfg.max_aspect:g}")


def keep_captions(
    cfg: FilterConfig, captions: Sequence[str], weights: Sequence[float]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The captions that pass, and their weights if there are any. Raises the first one's Filtered if none passes."""
    faults: list[Filtered] = []
    kept: list[int] = []
    for number, caption in enumerate(captions):
        try:
            check_caption(cfg, caption)
            kept.append(number)
        except Filtered as fault:
            faults.append(fault)
    if not kept:
        raise faults[0]
    return tuple(captions[n] for n in kept), tuple(weights[n] for n in kept) if weights else ()


def check_caption(cfg: FilterConfig, caption: str) -> None:
    """Raise Filtered: caption_too_short, caption_too_long or junk_caption."""
    for what, count in (("chars", len(caption)), ("words", len(caption.split()))):
        least, most = getattr(cfg, f"min_caption_{what}"), getattr(cfg, f"max_caption_{what}")
        if least is not None and count < least:
            raise Filtered("caption_too_short", f"{count} of at least {least} {what}: {_shown(caption)}")
        if most is not None and count > most:
            raise Filtered("caption_too_long", f"{count} of at most {most} {what}: {_shown(caption)}")
    if cfg.junk_captions and (why := junk(caption)):
        raise Filtered("junk_caption", f"{why}: {_shown(caption)}")


_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_URL = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_FILE_NAME = re.compile(r".*\S\.(jpe?g|png|gif|webp|bmp|tiff?|heic|svg|pdf|psd|mp4|mov)", re.IGNORECASE)
_NUMBERED = re.compile(
    r"(img|image|imag|dsc[nf]?|p|pxl|mvi|gopr?|dji|photo|foto|picture|pic|screenshot|screen shot|untitled|scan)"
    r"[ _#(-]*\d[\d _():.-]*",
    re.IGNORECASE,
)


def junk(caption: str) -> str:
    """Why a caption cannot describe an image in any language; empty if it might."""
    if not any(map(_is_letter, _URL.sub("", caption))) and _URL.search(caption):
        return "only an address"
    if _FILE_NAME.fullmatch(caption) or _NUMBERED.fullmatch(caption):
        return "a file name"
    visible = [char for char in caption if not char.isspace()]
    if sum(map(_is_letter, visible)) < len(visible) / 4:
        return "hardly any letters"
    words = caption.casefold().split()
    if len(set(words)) == 1 and (len(words) >= 3 or (len(words[0]) >= 4 and len(set(words[0])) == 1)):
        return "one word or letter repeated"
    return ""


def read_list(uri: str, *, setting: str) -> frozenset[str]:
    """The keys and hashes (in lower case) of a file, one per line. Raises ValueError if it is missing or not UTF-8."""
    try:
        text = _read(uri, setting=setting).decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting}: {uri} is not UTF-8 text ({error}); save it as UTF-8, one key per line") from None
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return frozenset(line.lower() if _SHA256.fullmatch(line) else line for line in lines if line)


def read_blocklist(cfg: FilterConfig) -> frozenset[str]:
    """What `read_list` finds in the blocklist; empty without one."""
    return read_list(cfg.blocklist, setting="filters.blocklist") if cfg.blocklist else frozenset()


def blocklist_digest(cfg: FilterConfig) -> str:
    """sha256 of the blocklist's bytes; empty without one."""
    return hashlib.sha256(_read(cfg.blocklist, setting="filters.blocklist")).hexdigest() if cfg.blocklist else ""


def check_blocked(blocked: Collection[str], *, key: str, sha256: str) -> None:
    """Raise Filtered if a key or a hash is on the blocklist."""
    for what, value in (("key", key), ("sha256", sha256)):
        if value in blocked:
            raise Filtered("blocked", f"its {what} is on the blocklist")


def _read(uri: str, *, setting: str) -> bytes:
    try:
        return read_file(uri)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{setting}: there is no file {uri}; correct the path") from None


def _is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] in "LM"  # with the marks, which are the vowels of many scripts


def _shown(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else caption[:57] + "...")
