"""The packed feature cache: a folder of `.npy` files per shard, row-aligned with the shard, read where it is.

Shape legend: N samples of a shard, V variants (1, or the image and its mirror image), T captions of a shard,
K tokens of captions, B samples of a batch, C H W of the latents, D embedding width, E width of the text encodings,
L tokens of the longest caption of a batch.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from genpipe.artifacts import Artifact
from genpipe.data.block_cache import RemoteFiles, remote_files, whole_copy
from genpipe.data.order import pick
from genpipe.data.packed_arrays import VARIANT_ARRAYS, Arrays, Layout, MappedArrays, RemoteArrays
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import Split

TEXT_ARRAYS = ("text_embeds", "text_encodings", "token_offsets")
NEEDS = {  # what makes no sense without another
    "latent_logvars": "latents",
    "caption_weights": "caption_offsets",
    "text_embeds": "caption_offsets",
    "text_encodings": "token_offsets",
    "token_offsets": "caption_offsets",
}
KINDS = {  # numpy's dtype kinds: U text, f float, i and u integers
    "keys": "U",
    "rows": "iu",
    "labels": "i",
    "latents": "f",
    "latent_logvars": "f",
    "image_embeds": "f",
    "caption_offsets": "iu",
    "caption_weights": "f",
    "text_embeds": "f",
    "text_encodings": "f",
    "token_offsets": "iu",
}
NULL_TEXT = "null_text"


def write_features(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one shard's features into `folder`, named as the shard: whole or absent, replaced if present.

    keys [N] str; latents [N, V, C, H, W], latent_logvars alike and image_embeds [N, V, D] float16 or float32; labels
    [N] int, -1 for none; rows [N] int, the row that stands for each: itself, unless its image was damaged;
    caption_offsets [N + 1]: the captions of row i are offsets[i] to offsets[i + 1]; caption_weights float [T], how
    often each is to be chosen; text_embeds float [T, D]; text_encodings float [K, E], of the tokens of all captions
    without padding; token_offsets [T + 1]: the tokens of caption t are offsets[t] to offsets[t + 1].

    All but the keys may be left out, the same in every shard but for rows (if each is itself) and caption_weights (if
    all are alike).
    """
    _check_arrays(arrays)
    _write(folder, arrays)


def write_null_text(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what text encoders say of the empty caption into the cache's `folder`: text arrays of T = 1."""
    assert arrays and set(arrays) <= set(TEXT_ARRAYS)
    _write(folder / NULL_TEXT, arrays)


class _Entry(NamedTuple):
    """One entry of an array, as it is laid out in the first shard that has the array."""

    shard: int
    dtype: np.dtype
    shape: tuple[int, ...]
    bytes: int


class FeatureDataset:
    """The cached features of one split. Index i is the sample that `ShardDataset` of the same split calls i.

    Which there are depends on the encoders that made them: `arrays` are the names of what can be asked for.

    Batches come back as torch tensors in the dtype of the cache (float16 or float32). Thread-safe; pickled as its
    arguments. What is read is a folder or, piece by piece, the files of an artifact elsewhere.
    """

    def __init__(self, source: Path | RemoteFiles, *, split: Split) -> None:
        self.source, self.split = source, split
        self._arrays = _arrays_of(source, prefix=f"{split}-")
        self.where, self._names = self._arrays.where, self._arrays.names
        if not self._names:
            raise ValueError(f"{self.where} holds no {split} features ({split}-*/keys.npy)")
        held = [self._arrays.held(shard) for shard in range(len(self._names))]
        self.arrays = held[0]
        self._starts = np.cumsum([0, *map(self._arrays.samples, range(len(held)))])
        self._damaged = {shard for shard, names in enumerate(held) if "rows" in names}
        self._weighted = {shard for shard, names in enumerate(held) if "caption_weights" in names}
        self._entry = cache(self._entry_of)

    def __reduce__(self) -> Any:
        return partial(FeatureDataset, split=self.split), (self.source,)

    def __len__(self) -> int:
        """The samples of all shards."""
        return int(self._starts[-1])

    @property
    def keys(self) -> list[str]:
        """The keys of all samples in order."""
        return [str(key) for shard in range(len(self._names)) for key in self._arrays.whole(shard, "keys")]

    @property
    def variants(self) -> int:
        """How many versions of each image are cached: 1, or 2 with its mirror image."""
        images = self.arrays.intersection(VARIANT_ARRAYS)
        return self._layout(min(images)).shape[1] if images else 1

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._layout("latents").shape[2:]

    @property
    def has_spread(self) -> bool:
        """Whether the latents' log variances are cached, so that `latent_samples` works."""
        return "latent_logvars" in self.arrays

    def shards(self) -> list[str]:
        """Names of the shards in order."""
        return list(self._names)

    def latents(self, indices: np.ndarray, *, variants: np.ndarray | None = None) -> torch.Tensor:
        """[B, C, H, W]: the autoencoder's mean, standardized. `variants` int [B]: which version of each image."""
        return self._gather("latents", *self._versions(indices, variants))

    def latent_samples(
        self, indices: np.ndarray, *, noise: np.ndarray, variants: np.ndarray | None = None
    ) -> torch.Tensor:
        """[B, C, H, W]: mean + exp(logvar / 2) noise, standardized; `noise` float32 [B, C, H, W]."""
        versions = self._versions(indices, variants)
        mean, logvar = self._gather("latents", *versions), self._gather("latent_logvars", *versions)
        return torch.addcmul(mean.float(), (0.5 * logvar.float()).exp(), torch.from_numpy(noise)).to(mean.dtype)

    def image_embeds(self, indices: np.ndarray, *, variants: np.ndarray | None = None) -> torch.Tensor:
        """[B, D]."""
        return self._gather("image_embeds", *self._versions(indices, variants))

    def labels(self, indices: np.ndarray) -> torch.Tensor:
        """int64 [B]: the places of the samples' classes in the list `classes` of the artifact's meta, -1 for none."""
        return self._gather("labels", *self._places(indices)).long()

    def text(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, torch.Tensor]:
        """One caption of each sample, as `Text.from_cache` takes it: what there is of it in the cache.

        text_embeds [B, D]; text_encodings [K, E], of the tokens of these captions, one after the other; text_places
        int64 [B, L], where each caption's tokens stand among them, -1 for padding. draws: float [B] in [0, 1), which
        caption of each sample; 0 is the first.
        """
        if not self.arrays.intersection(TEXT_ARRAYS):
            return {}
        shards, rows = self._places(indices)
        captions = self._captions(shards, rows, draws)
        embeds = {"text_embeds": self._gather("text_embeds", shards, captions)} if "text_embeds" in self.arrays else {}
        if "text_encodings" not in self.arrays:
            return embeds
        starts, stops = self._read("token_offsets", shards, captions, captions + 2).reshape(-1, 2).T
        return {
            **embeds,
            "text_encodings": self._gather("text_encodings", shards, starts, stops=stops),
            "text_places": _token_places(stops - starts),
        }

    def text_embeds(self, indices: np.ndarray) -> torch.Tensor:
        """[B, D]: of each sample's first caption."""
        shards, rows = self._places(indices)
        return self._gather("text_embeds", shards, self._captions(shards, rows, np.zeros(len(rows))))

    def chunks(self, name: Literal["text_embeds", "image_embeds"], *, size: int = 2**16) -> Iterator[torch.Tensor]:
        """The embeddings of all samples in order, at most `size` at a time, [n, D]: of first captions, or of images.

        Only these files are read, one shard's at a time, so that memory does not grow with the number of samples.
        """
        for shard in range(len(self._names)):
            embeds = self._arrays.whole(shard, name)
            places = np.arange(self._starts[shard + 1] - self._starts[shard])
            if shard in self._damaged:
                places = self._arrays.whole(shard, "rows")
            if name == "text_embeds":
                places = self._arrays.whole(shard, "caption_offsets")[places]
            for first in range(0, len(places), size):
                some = embeds[places[first : first + size]]
                yield torch.from_numpy(some[:, 0] if name in VARIANT_ARRAYS else some)

    def null_text(self) -> dict[str, torch.Tensor]:
        """The empty caption as `text` gives others, B = 1: what a dropped caption is replaced by."""
        arrays = {name: torch.from_numpy(array) for name, array in self._arrays.beside(NULL_TEXT).items()}
        if "token_offsets" in arrays:
            arrays["text_places"] = _token_places(arrays.pop("token_offsets").diff().numpy())
        return arrays

    def verify_alignment(self, shards: ShardDataset) -> None:
        """Raise ValueError unless `shards` has the same sample, with as many captions, at every index."""
        if self.shards() != shards.shards():
            raise ValueError(f"{self.where} was not made from {shards.folder}: other shards; cache again")
        for number, name in enumerate(self._names):
            rows = shards.rows(name)
            same = [shards.key(i) for i in rows] == self._arrays.whole(number, "keys").tolist()
            if "caption_offsets" in self.arrays:
                counts = np.diff(self._arrays.whole(number, "caption_offsets")).tolist()
                same = same and [len(shards.captions(i)) for i in rows] == counts
            if not same:
                where = f"{self.where}/{name}"
                raise ValueError(f"{where} holds other samples than {shards.folder / name}.tar; cache again")

    def _layout(self, name: str) -> Layout:
        return self._arrays.layout(0, name)

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each index, and the row there that stands for it."""
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"samples {indices.min()} to {indices.max()} of {len(self)}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[shards]
        if self._damaged and (there := np.isin(shards, list(self._damaged))).any():
            rows[there] = self._read("rows", shards[there], rows[there], rows[there] + 1)
        return shards, rows

    def _versions(self, indices: np.ndarray, variants: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each image, and its place among all variants of all rows there."""
        shards, rows = self._places(indices)
        places = rows * self.variants
        return shards, places if variants is None else places + variants

    def _captions(self, shards: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """int64 [B]: where the caption of each row stands, in its shard, on which the draw falls."""
        firsts, stops = self._read("caption_offsets", shards, rows, rows + 2).reshape(-1, 2).T
        weights: list[np.ndarray | None] = [None] * len(shards)
        if self._weighted and len(there := np.flatnonzero(np.isin(shards, list(self._weighted)))):
            joined = self._read("caption_weights", shards[there], firsts[there], stops[there])
            ends = np.cumsum(stops[there] - firsts[there])[:-1]
            for place, own in zip(there.tolist(), np.split(joined, ends), strict=True):
                weights[place] = own
        chosen = zip(draws.tolist(), (stops - firsts).tolist(), weights, strict=True)
        return firsts + np.asarray([pick(draw, count=count, weights=own) for draw, count, own in chosen], np.int64)

    def _gather(
        self, name: str, shards: np.ndarray, starts: np.ndarray, *, stops: np.ndarray | None = None
    ) -> torch.Tensor:
        """An array's entries at these places of the shards, [B, ...]; or those from `starts` to `stops`, joined."""
        return torch.from_numpy(self._read(name, shards, starts, starts + 1 if stops is None else stops))

    def _read(self, name: str, shards: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Those of an array's entries that are from `starts` to `stops` of the shards, joined."""
        entry = self._entry(name)
        spans = (starts * entry.bytes).tolist(), (stops * entry.bytes).tolist()
        joined = self._arrays.read(name, shards.tolist(), *spans, like=entry.shard)
        return np.frombuffer(joined, entry.dtype).reshape(-1, *entry.shape)

    def _entry_of(self, name: str) -> _Entry:
        shard = min({"rows": self._damaged, "caption_weights": self._weighted}.get(name, {0}))
        layout = self._arrays.layout(shard, name)
        shape = layout.shape[2 if name in VARIANT_ARRAYS else 1 :]
        return _Entry(shard, layout.dtype, shape, layout.dtype.itemsize * math.prod(shape))


def open_features(artifact: Artifact, *, split: Split) -> FeatureDataset:
    """The features of an artifact, where they are: those under S3 are read piece by piece, as shards are.

    `genpipe.data.block_cache.remote_files` says how. Raises ValueError for arrays that do not belong to one cache.
    """
    return FeatureDataset(whole_copy(artifact) or remote_files(artifact), split=split)


def _arrays_of(source: Path | RemoteFiles, *, prefix: str) -> Arrays:
    if isinstance(source, RemoteFiles):
        return RemoteArrays(source, prefix=prefix)
    return MappedArrays(source, prefix=prefix)


def _token_places(lengths: np.ndarray) -> torch.Tensor:
    """int64 [B, L]: the numbers of the tokens of captions of these lengths [B], -1 beyond a caption's end."""
    positions = np.arange(lengths.max())
    places = (np.cumsum(lengths) - lengths)[:, None] + positions
    return torch.from_numpy(np.where(positions < lengths[:, None], places, -1))


def _write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(partial_folder / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial_folder, folder)


def _check_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    assert {"keys"} < set(arrays) <= set(KINDS), f"features must be of {sorted(KINDS)}: {sorted(arrays)}"
    assert all(NEEDS[name] in arrays for name in arrays if name in NEEDS), f"some lack their own: {sorted(arrays)}"
    samples = len(arrays["keys"])
    captions, tokens = (int(arrays[name][-1]) if name in arrays else 0 for name in ("caption_offsets", "token_offsets"))
    rows = {
        "caption_offsets": samples + 1,
        "caption_weights": captions,
        "text_embeds": captions,
        "text_encodings": tokens,
        "token_offsets": captions + 1,
    }
    for name, array in arrays.items():
        fits = array.dtype.kind in KINDS[name] and len(array) == rows.get(name, samples)
        assert fits, f"{name}: {array.dtype} {array.shape}"
