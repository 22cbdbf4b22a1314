"""What a system is asked to draw: captions of shards, a file of texts, texts of the configuration, classes, or shapes.

A prompt belongs to a split: `train` where the system may have been trained on it, `heldout` where it was not, and
`combinations` where it was trained on other samples of the same subject.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, Tag

from genpipe.artifacts import Artifact
from genpipe.config import Config, Location, by_kind
from genpipe.data.order import order
from genpipe.data.shape_scenes import TASKS, Task, askable, caption_of
from genpipe.data.shard_dataset import ShardDataset, open_shards
from genpipe.data.shards import NO_LABEL, SPLITS, Split
from genpipe.data.text import clean_text, is_visible
from genpipe.storage import read_file


class Prompt(NamedTuple):
    """One picture to draw.

    `label` is the place of its class, NO_LABEL without one. `reference` is the key of the sample whose caption it is,
    and `group` that sample's subject; empty for other prompts.
    """

    text: str
    label: int = NO_LABEL
    reference: str = ""
    group: str = ""


class CaptionPrompts(Config):
    """First captions of the shards' samples, chosen at random."""

    kind: Literal["captions"] = "captions"
    train: int = Field(256, ge=0, description="training captions")
    combinations: int = Field(0, ge=0, description="captions of held-out samples whose subject is trained on")
    heldout: int = Field(64, ge=0, description="captions of held-out subjects")


class FilePrompts(Config):
    """A text file with a prompt a line; they count as held out."""

    kind: Literal["file"]
    path: Location = Field(description="path or s3:// URI")


class ListPrompts(Config):
    """Texts of the configuration; they count as held out unless they are captions of training samples."""

    kind: Literal["list"]
    texts: tuple[str, ...] = Field(min_length=1, description="the prompts")
    captions_of: Split | None = Field(None, description="the split of the shards that they are captions of, if any")


class ClassPrompts(Config):
    """Every class of the system as often; they count as training prompts."""

    kind: Literal["classes"]
    count: int = Field(16, ge=1, description="pictures of each class")


class ShapesPrompts(Config):
    """Texts about colored shapes, for the metric `composition`, no two alike; they count as held out."""

    kind: Literal["shapes"]
    tasks: tuple[Task, ...] = Field(TASKS, min_length=1, description="what is asked for")
    count: int = Field(48, ge=1, description="prompts of each task, chosen at random; all, if it has fewer")


class NoPrompts(Config):
    """Nothing, for an unconditional system; they count as training prompts."""

    kind: Literal["none"]
    count: int = Field(256, ge=1, description="pictures")


AnyConfig = CaptionPrompts | FilePrompts | ListPrompts | ClassPrompts | ShapesPrompts | NoPrompts
PromptsConfig = Annotated[
    Annotated[CaptionPrompts, Tag("captions")]
    | Annotated[FilePrompts, Tag("file")]
    | Annotated[ListPrompts, Tag("list")]
    | Annotated[ClassPrompts, Tag("classes")]
    | Annotated[ShapesPrompts, Tag("shapes")]
    | Annotated[NoPrompts, Tag("none")],
    by_kind("captions"),
]


def needs_shards(cfg: AnyConfig) -> bool:
    """Whether the prompts are captions of shards."""
    return isinstance(cfg, CaptionPrompts) or _captions_of(cfg) is not None


def _captions_of(cfg: AnyConfig) -> Split | None:
    return cfg.captions_of if isinstance(cfg, ListPrompts) else None


def check_prompts(cfg: AnyConfig, *, system: Artifact, shard: Artifact | None) -> None:
    """Raise ValueError for prompts that do not say what the system must be told, or that the shards do not have."""
    of_combinations = _captions_of(cfg) == "combinations" or (isinstance(cfg, CaptionPrompts) and cfg.combinations > 0)
    if of_combinations and shard is not None and not shard.meta.get("combinations"):
        raise ValueError(
            "prompts: the shards hold out no combinations; set combinations_fraction in their stage, or ask for none"
        )
    kinds = {"text": "captions, file, list or shapes", "label": "classes, or captions of shards with class labels"}
    known = shard is not None and "classes" in shard.meta  # not before the shards are made
    labeled = shard is not None and (not known or bool(shard.meta["classes"]))
    gives = {"text"} | ({"label"} if labeled else set())
    if isinstance(cfg, ClassPrompts | NoPrompts):
        gives = {"label"} if isinstance(cfg, ClassPrompts) else set()
    for condition in system.meta["conditioned_on"]:
        if condition not in gives:
            raise ValueError(
                f"prompts.kind {cfg.kind}: the system is conditioned on {condition}, which these prompts do not give; "
                f"use {kinds[condition]}"
            )
    both = shard is not None and known and "classes" in system.meta
    if both and shard is not None and system.meta["classes"] not in ([], shard.meta["classes"]):
        raise ValueError("inputs.shard has other classes than the system; map the shards that it was trained on")


def prompts_digest(cfg: AnyConfig) -> str:
    """sha256 (hex) of a prompt file, empty for other prompts. Raises ValueError where there is none."""
    return hashlib.sha256(_read(cfg.path, setting="prompts.path")).hexdigest() if isinstance(cfg, FilePrompts) else ""


def open_prompts(
    cfg: AnyConfig, *, shard: Artifact | None, classes: Sequence[str], seed: int
) -> dict[Split, Sequence[Prompt]]:
    """The prompts of each split; captions are read when they are asked for.

    `classes` are the system's. Raises ValueError for a caption that no sample has, with the nearest that one has.
    """
    found: dict[Split, Sequence[Prompt]] = {split: () for split in SPLITS}
    if isinstance(cfg, CaptionPrompts):
        assert shard is not None, "the role is required"
        wanted: dict[Split, int] = {"train": cfg.train, "combinations": cfg.combinations, "heldout": cfg.heldout}
        for split, count in wanted.items():
            if count:
                found[split] = Captions.chosen(open_shards(shard, split=split), count, seed=seed)
    elif isinstance(cfg, ListPrompts) and cfg.captions_of is not None:
        assert shard is not None, "the role is required"
        dataset = open_shards(shard, split=cfg.captions_of)
        found[cfg.captions_of] = Captions(dataset, find_captions(dataset, cfg.texts))
    elif isinstance(cfg, ListPrompts):
        found["heldout"] = [Prompt(clean_text(text)) for text in cfg.texts]
    elif isinstance(cfg, FilePrompts):
        found["heldout"] = [Prompt(text) for text in read_prompts(cfg.path)]
    elif isinstance(cfg, ShapesPrompts):
        found["heldout"] = [Prompt(text) for task in cfg.tasks for text in _about_shapes(task, cfg.count, seed=seed)]
    elif isinstance(cfg, ClassPrompts):
        found["train"] = [Prompt(name, label) for label, name in enumerate(classes) for _ in range(cfg.count)]
    else:
        found["train"] = [Prompt("")] * cfg.count
    return found


def _about_shapes(task: Task, count: int, *, seed: int) -> list[str]:
    every = askable(task)
    chosen = order(np.arange(min(count, len(every))), n=len(every), seed=seed)
    return [caption_of(every[place]) for place in chosen]


@dataclass(frozen=True)
class Captions(Sequence[Prompt]):
    """The first captions of samples of a split."""

    dataset: ShardDataset
    indices: np.ndarray

    @classmethod
    def chosen(cls, dataset: ShardDataset, count: int, *, seed: int) -> Captions:
        """Of as many samples, chosen at random; of all, if there are no more."""
        return cls(dataset, order(np.arange(min(count, len(dataset))), n=len(dataset), seed=seed))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Prompt:  # type: ignore[override]
        i = int(self.indices[place])
        label = int(self.dataset.labels(np.asarray([i]))[0])
        return Prompt(self.dataset.captions(i)[0], label, self.dataset.key(i), self.dataset.group(i))


def find_captions(dataset: ShardDataset, captions: Sequence[str]) -> np.ndarray:
    """The first sample with each of these as its first caption. Raises ValueError that names the nearest there is."""
    captions = [clean_text(caption) for caption in captions]
    wanted, found = set(captions), dict[str, int]()
    for i, caption in enumerate(_captions(dataset)):
        if caption in wanted:
            found.setdefault(caption, i)
    for caption in captions:
        if caption not in found:
            near = difflib.get_close_matches(caption, _captions(dataset), n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"prompts.texts: no {dataset.split} sample has the caption {caption!r}{hint}")
    return np.asarray([found[caption] for caption in captions])


def _captions(dataset: ShardDataset) -> Iterator[str]:
    return (dataset.captions(i)[0] for i in range(len(dataset)))


def read_prompts(path: str, *, setting: str = "prompts.path") -> list[str]:
    """The prompts of a text file, one a line, without empty lines. Raises ValueError, naming `setting`, for none."""
    try:
        lines = _read(path, setting=setting).decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{setting}: {path} is not UTF-8; save it as UTF-8") from None
    texts = [text for text in map(clean_text, lines) if is_visible(text)]
    if not texts:
        raise ValueError(f"{setting}: {path} holds no prompts; write one a line")
    return texts


def _read(path: str, *, setting: str) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise ValueError(f"{setting}: {path} cannot be read ({error}); correct the path") from None
