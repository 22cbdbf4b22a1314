"""The packed feature cache: a folder of `.npy` files per shard, row-aligned with the shard, memory-mapped.

Shape legend: N samples of a shard, T captions of a shard, B samples of a batch, C H W of the latents,
D embedding width, L caption tokens, E width of the text encodings.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from genpipe.data.shards import Split
from genpipe.data.stream import ShardDataset

CAPTION_ARRAYS = ("text_embeds", "text_tokens", "text_encodings", "text_lengths")  # [T, ...]
KINDS = {  # numpy's dtype kinds: U text, f float, i and u integers
    "keys": "U",
    "latents": "f",
    "image_embeds": "f",
    "caption_offsets": "iu",
    "text_embeds": "f",
    "text_tokens": "iu",
    "text_encodings": "f",
    "text_lengths": "iu",
}


def write_features(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one shard's features into `folder`, named as the shard: whole or absent, replaced if present.

    keys [N] str; latents [N, C, H, W] and image_embeds [N, D] float16 or float32; caption_offsets [N + 1]:
    the captions of row i are offsets[i] to offsets[i + 1]; text_embeds [T, D] and text_encodings [T, L, E]
    float; text_tokens int [T, L]; text_lengths int [T]. `text_tokens` may be left out.
    """
    _check_arrays(arrays)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


class FeatureDataset:
    """The cached features of one split. Index i is the sample that `ShardDataset` of the same split calls i.

    Batches come back as torch tensors in the dtype of the cache (float16 or float32).
    """

    def __init__(self, folder: Path, *, split: Split) -> None:
        self.folder = Path(folder)
        shards = sorted(path for path in self.folder.glob(f"{split}-*") if path.is_dir())
        if not shards:
            raise ValueError(f"{self.folder} holds no {split} features ({split}-*/latents.npy)")
        self._names = [path.name for path in shards]
        self._shards = [{file.stem: _open(file) for file in sorted(path.glob("*.npy"))} for path in shards]
        self._starts = np.cumsum([0, *(len(shard["keys"]) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def keys(self) -> list[str]:
        """The keys of all samples in order."""
        return [str(key) for shard in self._shards for key in shard["keys"]]

    def shards(self) -> list[str]:
        """Names of the shards in order."""
        return list(self._names)

    def latents(self, indices: np.ndarray) -> torch.Tensor:
        """[B, C, H, W]: the autoencoder's mean, standardised."""
        return self._gather("latents", *self._locate(indices))

    def image_embeds(self, indices: np.ndarray) -> torch.Tensor:
        """[B, D]."""
        return self._gather("image_embeds", *self._locate(indices))

    def caption_counts(self, indices: np.ndarray) -> np.ndarray:
        """int64 [B]: how many captions each sample has."""
        shards, rows = self._locate(indices)
        first, stop = self._caption_bounds(shards, rows)
        counts: np.ndarray = stop - first
        return counts

    def text(self, indices: np.ndarray, caption_choice: np.ndarray) -> dict[str, torch.Tensor]:
        """text_embeds [B, D], text_encodings [B, L, E], text_lengths [B], and text_tokens [B, L] if cached.

        L is the length of the longest of these captions: what lies beyond it is padding for all of them.

        caption_choice: int64 [B], any non-negative numbers; a sample takes caption `choice % its captions`.
        """
        shards, rows = self._locate(indices)
        first, stop = self._caption_bounds(shards, rows)
        captions = first + np.asarray(caption_choice) % (stop - first)
        lengths = self._gather("text_lengths", shards, captions)
        longest = int(lengths.max())
        tokenwise = [name for name in ("text_encodings", "text_tokens") if name in self._shards[0]]
        return {
            "text_embeds": self._gather("text_embeds", shards, captions),
            "text_lengths": lengths,
            **{name: self._gather(name, shards, captions, tokens=longest) for name in tokenwise},
        }

    def verify_alignment(self, shards: ShardDataset) -> None:
        """Raise ValueError unless `shards` has the same sample, with as many captions, at every index."""
        if self.shards() != shards.shards():
            raise ValueError(f"{self.folder} was not made from {shards.folder}: other shards; cache again")
        for name, arrays in zip(self._names, self._shards, strict=True):
            rows = shards.rows(name)
            keys = [shards.key(i) for i in rows]
            counts = [len(shards.captions(i)) for i in rows]
            if keys != arrays["keys"].tolist() or counts != np.diff(arrays["caption_offsets"]).tolist():
                where = self.folder / name
                raise ValueError(f"{where} holds other samples than {shards.folder / name}.tar; cache again")

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard number of each index and its row there."""
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"samples {indices.min()} to {indices.max()} of {len(self)}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return shards, indices - self._starts[shards]

    def _caption_bounds(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bounds = np.empty((2, len(rows)), np.int64)
        for shard in np.unique(shards):
            mine = shards == shard
            offsets = self._shards[shard]["caption_offsets"]
            bounds[:, mine] = offsets[rows[mine]], offsets[rows[mine] + 1]
        return bounds[0], bounds[1]

    def _gather(self, name: str, shards: np.ndarray, rows: np.ndarray, *, tokens: int | None = None) -> torch.Tensor:
        """Rows of an array across shards; `tokens` limits the second axis."""
        cut = slice(None) if tokens is None else (slice(None), slice(tokens))
        first = self._shards[0][name][:1][cut]
        batch = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for shard in np.unique(shards):
            mine = shards == shard
            batch[mine] = self._shards[shard][name][rows[mine]][cut]
        return torch.from_numpy(batch)


def _open(file: Path) -> np.ndarray:
    array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _check_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    assert set(KINDS) == {*arrays, "text_tokens"}, f"features must be {sorted(KINDS)}: {sorted(arrays)}"
    samples, captions = len(arrays["keys"]), int(arrays["caption_offsets"][-1])
    for name, array in arrays.items():
        rows = captions if name in CAPTION_ARRAYS else samples + (name == "caption_offsets")
        assert array.dtype.kind in KINDS[name] and len(array) == rows, f"{name}: {array.dtype} {array.shape}"
