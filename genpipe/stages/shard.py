"""shard: a source's images and captions to WebDataset tars with indexes and a ledger of rejects.

A data stage: the parts are slices of the source, and each is written by one call of `Worker`. Every sample of
the source is either in an index or in the ledger. Files of part p: `{train,combinations,heldout}-{p:05d}-{k:02d}.tar`
with their `.index.parquet`, `rejects-{p:05d}.parquet`, `hashes-{p:05d}.parquet` where duplicates are looked for,
`groups-{p:05d}.parquet` where combinations are held out, and beside part 0 a contact sheet, `preview.png`.
`statistics.parquet` has a row for each shard.

Duplicates are found across all parts when the last is there. They leave the indexes for
`rejects-duplicates.parquet`; their bytes stay in the tars unread. Combinations that are held out are chosen then,
too, and leave the indexes of the training shards.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from genpipe.artifacts import Artifact, Role
from genpipe.data.classes import numbered_classes
from genpipe.data.combinations import Member, leaving, members_file, read_members, write_members
from genpipe.data.duplicates import Duplicate, find_duplicates, read_hashes, write_hashes, write_index_without
from genpipe.data.filters import (
    FilterConfig,
    Filtered,
    blocklist_digest,
    check_blocked,
    check_size,
    keep_captions,
    read_blocklist,
)
from genpipe.data.images import (
    MAX_PIXELS,
    RGB,
    WHITE,
    Buckets,
    CenterCrop,
    ImageError,
    ImageFormat,
    Keep,
    Picture,
    ResizeConfig,
    buckets,
    check_kept,
    check_same_aspect,
    decode,
    encode,
    prepare,
    read_header,
)
from genpipe.data.perceptual_hash import perceptual_hash
from genpipe.data.samples import Reject, Sample
from genpipe.data.shards import (
    NO_LABEL,
    SPLITS,
    ShardWriter,
    Split,
    split_of,
    statistics,
    write_rejects,
    write_statistics,
)
from genpipe.data.sheets import contact_sheet
from genpipe.data.sources import SourceConfig, declared_classes, has_conditions, open_source
from genpipe.stage_config import StageConfig
from genpipe.storage import Storage

VERSION = 4
MAKES = "shards"
HEADLINES = ("samples_train", "samples_combinations", "samples_heldout", "rejected")
PREVIEW_IMAGES = 64
PREVIEW_CELL = 128
HASHED_SIDE = 128


class Config(StageConfig):
    """How images become shards. `resize` says what `image_size` means; each filter is off until it is set."""

    source: SourceConfig = Field(description="where images and captions come from")
    image_size: int = Field(64, ge=8, description="pixels, as resize says; of kept images, what training may ask for")
    resize: ResizeConfig = Field(CenterCrop(), description="what image_size means")
    background: RGB = Field(WHITE, description="color below what is transparent")
    format: ImageFormat = Field("jpeg", description="of the stored images, unless they are kept")
    quality: int = Field(95, ge=1, le=100, description="of jpeg and webp; png is lossless")
    max_image_pixels: int = Field(2**26, gt=0, le=MAX_PIXELS, description="larger images are rejected undecoded")
    filters: FilterConfig = FilterConfig()
    heldout_fraction: float = Field(0.05, gt=0, lt=1, description="share of subjects kept from training")
    combinations_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of subjects of which one sample of several is kept from training",
    )
    split_seed: int = Field(0, description="other seeds hold out other subjects")
    part_size: int = Field(10_000, gt=0, description="samples in a part of work and at most in a shard")
    max_shard_bytes: int = Field(256 * 2**20, gt=0, description="a larger part is written as several shards")

    @model_validator(mode="after")
    def _some_are_trained_on(self) -> Self:
        if self.heldout_fraction + self.combinations_fraction > 1:
            raise ValueError(
                "heldout_fraction and combinations_fraction are shares of all subjects; lower one, so that their sum "
                "is at most 1"
            )
        return self

    @model_validator(mode="after")
    def _resize_fits(self) -> Self:
        if isinstance(self.resize, Buckets):
            buckets(self.resize, size=self.image_size)
        if isinstance(self.resize, Keep) and self.background != WHITE:
            raise ValueError("background has no effect on images that resize.kind 'keep' leaves as they are (they are "
                             "laid on white when they are read); leave one of the two out")  # fmt: skip
        return self


def roles(cfg: Config) -> dict[str, Role]:
    """None: it reads the source."""
    return {}


def source_digest(cfg: Config) -> str:
    """The digest of what the stage reads from outside the pipeline: the source's content and the blocklist."""
    return open_source(cfg.source, part_size=cfg.part_size).digest() + blocklist_digest(cfg.filters)


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What consumers may rely on before the stage has run.

    `image_size` is the side of the squares that each image can give, `condition` whether every sample has a
    conditioning image, `combinations` whether there are held-out combinations; `classes`, the names in the order of
    their labels, is present if it can be known without reading the source.
    """
    side = cfg.image_size
    if isinstance(cfg.resize, Buckets):
        side = min(min(sides) for sides in buckets(cfg.resize, size=cfg.image_size))
    classes = declared_classes(cfg.source)
    known = {} if classes is None else {"classes": list(classes)}
    combinations = cfg.combinations_fraction > 0
    return {"image_size": side, "condition": has_conditions(cfg.source), "combinations": combinations, **known}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """The source's parts. Raises ValueError for a source that is missing, empty or without captions."""
    return open_source(cfg.source, part_size=cfg.part_size).parts()


@dataclass(frozen=True)
class Stored:
    """A sample as it goes into a shard; with the hashes of its image, where duplicates are looked for."""

    image: bytes
    format: str
    height: int
    width: int
    captions: tuple[str, ...]
    caption_weights: tuple[float, ...]
    hashes: dict[str, Any]
    label: int
    condition: bytes | None = None
    condition_format: str = ""


class Worker:
    """Lists the source once, then writes one part a call."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg = cfg
        self.source = open_source(cfg.source, part_size=cfg.part_size)
        self.number = {part: number for number, part in enumerate(self.source.parts())}
        self.blocked = read_blocklist(cfg.filters)
        classes = self.source.classes()
        self.label_of = None if classes is None else {name: label for label, name in enumerate(classes)}

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """Write the part's shards, ledger and hashes into `out`; its counts: samples_in = written + rejected."""
        number = self.number[part]
        rejects: list[Reject] = []
        hashes: list[dict[str, Any]] = []
        members: list[Member] = []
        keys: set[str] = set()
        preview: list[bytes] = []
        samples_in = dropped = 0
        largest_label = NO_LABEL
        with ExitStack() as stack:
            writers = {split: stack.enter_context(self._writer(out, split, number)) for split in SPLITS}
            for item in self.source.read(part):
                samples_in += 1
                stored = item if isinstance(item, Reject) else self._store(item, keys=keys)
                if isinstance(stored, Reject):
                    rejects.append(stored)
                    continue
                assert isinstance(item, Sample)
                split = self._split(item)
                writer = writers["train" if split == "combinations" else split]
                self._write(writer, item, stored)
                if split == "combinations":
                    self._write(writers[split], item, stored)
                    members.append(Member(item.group, item.key, writer.name, writers[split].name))
                keys.add(item.key)
                hashes.append({"shard": writer.name, "key": item.key, "place": _place(item), **stored.hashes})
                largest_label = max(largest_label, stored.label)
                dropped += len(item.captions) - len(stored.captions)
                if number == 0 and len(preview) < PREVIEW_IMAGES:
                    preview.append(stored.image)
        write_rejects(out, rejects, name=f"{number:05d}")
        if self.cfg.filters.finds_duplicates:
            write_hashes(out, hashes, part=number)
        if self.cfg.combinations_fraction:
            write_members(out, members, part=number)
        if preview:
            (out / "preview.png").write_bytes(preview_sheet(preview))
        return {
            "samples_in": samples_in,
            "captions_dropped": dropped,
            "largest_label": largest_label,
            "rejected": dict(sorted(Counter(reject.reason for reject in rejects).items())),
            "shards": [shard for writer in writers.values() for shard in writer.shards],
        }

    def _writer(self, out: Path, split: Split, number: int) -> ShardWriter:
        limits = {"max_samples": self.cfg.part_size, "max_bytes": self.cfg.max_shard_bytes}
        return ShardWriter(out, split=split, part=number, **limits)

    def _split(self, sample: Sample) -> Split:
        cfg = self.cfg
        fractions = {"heldout_fraction": cfg.heldout_fraction, "combinations_fraction": cfg.combinations_fraction}
        return split_of(sample.group, **fractions, seed=cfg.split_seed)

    def _write(self, writer: ShardWriter, sample: Sample, stored: Stored) -> None:
        writer.write(
            sample.key,
            group=sample.group,
            image=stored.image,
            format=stored.format,
            height=stored.height,
            width=stored.width,
            captions=stored.captions,
            caption_weights=stored.caption_weights,
            source=sample.source,
            label=stored.label,
            condition=stored.condition,
            condition_format=stored.condition_format,
            meta=sample.meta if sample.label is None else {**sample.meta, "class": sample.label},
        )

    def _store(self, sample: Sample, *, keys: set[str]) -> Stored | Reject:
        try:
            if sample.key in keys:
                raise Filtered("duplicate_key", "an earlier sample of this part has the key")
            return self._stored(sample)
        except (ImageError, Filtered) as fault:
            return Reject(sample.key, _place(sample), fault.reason, fault.detail)

    def _stored(self, sample: Sample) -> Stored:
        """The sample as it is to be stored, cheap checks first. Raises ImageError or Filtered."""
        cfg = self.cfg
        captions, weights = keep_captions(cfg.filters, sample.captions, sample.caption_weights)
        self._check_blocked(sample.key, sample.image)
        picture = read_header(sample.image, max_pixels=cfg.max_image_pixels)
        check_size(cfg.filters, height=picture.height, width=picture.width)
        label = self._label(sample)
        if isinstance(cfg.resize, Keep):
            check_kept(picture)
            pixels, image, format, height, width = None, sample.image, picture.format, picture.height, picture.width
        else:
            pixels = prepare(picture, resize=cfg.resize, size=cfg.image_size, background=cfg.background)
            image, format = encode(pixels, format=cfg.format, quality=cfg.quality), cfg.format
            height, width = pixels.shape[:2]
            self._check_blocked(sample.key, image)
        condition, condition_format = self._condition(sample.condition, picture)
        return Stored(
            image=image,
            format=format,
            height=height,
            width=width,
            captions=captions,
            caption_weights=weights,
            hashes=self._hashes(sample, pixels),
            label=label,
            condition=condition,
            condition_format=condition_format,
        )

    def _label(self, sample: Sample) -> int:
        """The place of a sample's class in the list of all. Raises Filtered for a class that came after the listing."""
        if sample.label is None:
            return NO_LABEL
        if self.label_of is None:
            return int(sample.label)
        if sample.label not in self.label_of:
            raise Filtered("new_class", f"the class {sample.label!r} was not there when the source was listed")
        return self.label_of[sample.label]

    def _condition(self, data: bytes | None, image: Picture) -> tuple[bytes | None, str]:
        """A conditioning image as it is to be stored beside `image`, losslessly, and its format. Raises ImageError."""
        cfg = self.cfg
        if data is None:
            return None, ""
        try:
            picture = read_header(data, max_pixels=cfg.max_image_pixels)
            check_same_aspect(picture, image)
            if isinstance(cfg.resize, Keep):
                check_kept(picture)
                return data, picture.format
            pixels = prepare(picture, resize=cfg.resize, size=cfg.image_size, background=cfg.background, beside=image)
        except ImageError as error:
            raise ImageError(error.reason, f"its conditioning image: {error.detail}") from None
        return encode(pixels, format="png"), "png"

    def _check_blocked(self, key: str, image: bytes) -> None:
        if self.blocked:
            check_blocked(self.blocked, key=key, sha256=hashlib.sha256(image).hexdigest())

    def _hashes(self, sample: Sample, pixels: np.ndarray | None) -> dict[str, Any]:
        """The hashes by which duplicates are found. Raises ImageError if kept bytes are damaged."""
        filters, phash = self.cfg.filters, None
        if filters.near_duplicates is not None:
            phash = perceptual_hash(decode(sample.image, least=HASHED_SIDE) if pixels is None else pixels)
        exact = hashlib.sha256(sample.image).digest() if filters.exact_duplicates else None
        return {"sha256": exact, "phash": phash}


def merge_parts(
    cfg: Config, inputs: Mapping[str, Artifact], made: Storage, results: list[dict[str, Any]], out: Path
) -> list[dict[str, Any]]:
    """Take duplicates, and what the other of two splits keeps, out of the indexes of all parts, which lie in `made`.

    Returns the results after that; new indexes and the ledger of duplicates go to `out`. Repeating it after an
    interrupted attempt gives the same: all follows from the tables of hashes and groups, which do not change.
    """
    filters = cfg.filters
    duplicates: list[Duplicate] = []
    if filters.finds_duplicates:
        hashes = read_hashes(made, parts=len(results))
        duplicates += find_duplicates(hashes, exact=filters.exact_duplicates, distance=filters.near_duplicates)
        write_rejects(out, [duplicate.reject for duplicate in duplicates], name="duplicates")
    reasons = {(duplicate.shard, duplicate.reject.key): duplicate.reject.reason for duplicate in duplicates}
    gone: dict[str, dict[str, str]] = defaultdict(dict)  # by shard, the keys that leave its index and why
    for (shard, key), reason in reasons.items():
        gone[shard][key] = reason
    if cfg.combinations_fraction:
        members = read_members(made, map(members_file, range(len(results))))
        for shard, key in leaving(members, without=reasons.keys(), seed=cfg.split_seed):
            gone[shard][key] = ""
    return [_without(result, gone, made, out) for result in results]


def _without(result: dict[str, Any], gone: Mapping[str, Mapping[str, str]], made: Storage, out: Path) -> dict[str, Any]:
    """A part's result, and its indexes, without what is gone; what has a reason is counted as rejected."""
    shards, rejected = [], Counter(result["rejected"])
    for shard in result["shards"]:
        keys = gone.get(shard["name"], {})
        rejected.update(reason for reason in keys.values() if reason)
        if keys:
            index = write_index_without(made, shard["name"], keys=keys.keys(), out=out)
            assert len(index) == shard["samples"] - len(keys), "keys are unique in a part"
            shard = statistics(shard["name"], index, tar_bytes=shard["bytes"])
        shards.append(shard)
    return {**result, "rejected": dict(sorted(rejected.items())), "shards": shards}


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The dataset's meta and metrics. Raises ValueError if a split is empty."""
    shards = [shard for result in results for shard in result["shards"] if shard["samples"]]
    splits = [split for split in SPLITS if split != "combinations" or cfg.combinations_fraction]
    by_split = {split: [shard for shard in shards if shard["split"] == split] for split in splits}
    samples = {split: sum(shard["samples"] for shard in of_split) for split, of_split in by_split.items()}
    rejected: Counter[str] = sum((Counter(result["rejected"]) for result in results), Counter())
    samples_in = sum(result["samples_in"] for result in results)
    written = sum(samples.values())
    assert samples_in == written + rejected.total(), "every sample is in an index or in the ledger"
    if not samples["train"]:
        why = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "none rejected"
        raise ValueError(
            f"source: none of the {samples_in} samples is left to train on ({why}; {samples['heldout']} held "
            "out); see `genpipe data rejects`, relax filters, or lower heldout_fraction"
        )
    if not samples["heldout"]:
        raise ValueError(
            f"heldout_fraction {cfg.heldout_fraction} of {written} samples left nothing to validate on; "
            "raise it, add images, or change split_seed; a group is never divided, so see that there are several"
        )
    if not samples.get("combinations", 1):
        raise ValueError(
            f"combinations_fraction {cfg.combinations_fraction} of {written} samples held none out; raise it, or leave "
            "it out where no subject has several samples: what a sample's group is, docs/data.md says for each source"
        )
    write_statistics(out, shards)
    meta = {
        **check_inputs(cfg, inputs),
        "classes": list(_classes(cfg, results)),
        "resize": cfg.resize.model_dump(mode="json"),
        "format": "as in the source" if isinstance(cfg.resize, Keep) else cfg.format,
        "samples": samples,
        "shards": {split: sorted(shard["name"] for shard in of_split) for split, of_split in by_split.items()},
        "rejected": dict(sorted(rejected.items())),
    }
    metrics = {
        "samples_in": samples_in,
        **{f"samples_{split}": count for split, count in samples.items()},
        "captions": sum(shard["captions"] for shard in shards),
        "captions_dropped": sum(result["captions_dropped"] for result in results),
        "rejected": rejected.total(),
        "bytes": sum(shard["bytes"] for shard in shards),
        **{f"rejected_{reason}": count for reason, count in rejected.items()},
    }
    return meta, {name: float(value) for name, value in metrics.items()}


def _classes(cfg: Config, results: list[dict[str, Any]]) -> tuple[str, ...]:
    """The names of the classes, each at its label."""
    classes = declared_classes(cfg.source)
    if classes is None:
        classes = open_source(cfg.source, part_size=cfg.part_size).classes()
    if classes is None:
        classes = numbered_classes(max(result["largest_label"] for result in results))
    return classes


def preview_sheet(images: list[bytes]) -> bytes:
    """A contact sheet of encoded images, as PNG; kept images that turn out damaged are skipped."""
    pixels = []
    for image in images:
        with suppress(ImageError):
            pixels.append(decode(image, least=PREVIEW_CELL))
    cell = min(PREVIEW_CELL, max((max(image.shape[:2]) for image in pixels), default=PREVIEW_CELL))
    return contact_sheet(pixels, columns=8, cell=cell)


def _place(sample: Sample) -> str:
    """Where a sample came from, for the ledger."""
    place = str(sample.meta.get("file_name", sample.key))
    return f"{sample.source}/{place}" if sample.source else place
