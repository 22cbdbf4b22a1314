"""The packed feature cache: a folder of `.npy` files per shard, row-aligned with the shard, memory-mapped.

Shape legend: N samples of a shard, V variants (1, or the image and its mirror image), T captions of a shard,
K tokens of captions, B samples of a batch, C H W of the latents, D embedding width, E width of the text encodings,
L tokens of the longest caption of a batch.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from genpipe.data.order import pick
from genpipe.data.shard_dataset import ShardDataset
from genpipe.data.shards import Split

TEXT_ARRAYS = ("text_embeds", "text_encodings", "token_offsets")
VARIANT_ARRAYS = ("latents", "latent_logvars", "image_embeds")  # [N, V, ...]
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
OPEN_ARRAYS = 4096


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


class FeatureDataset:
    """The cached features of one split. Index i is the sample that `ShardDataset` of the same split calls i.

    Which there are depends on the encoders that made them: `arrays` are the names of what can be asked for.

    Batches come back as torch tensors in the dtype of the cache (float16 or float32). Thread-safe; pickled as its
    arguments. Arrays are mapped when they are first used, `OPEN_ARRAYS` of them at a time.
    """

    def __init__(self, folder: Path, *, split: Split) -> None:
        self.folder, self.split = Path(folder), split
        self._names = sorted(path.name for path in self.folder.glob(f"{split}-*") if path.is_dir())
        if not self._names:
            raise ValueError(f"{self.folder} holds no {split} features ({split}-*/keys.npy)")
        self.arrays = frozenset(path.stem for path in (self.folder / self._names[0]).glob("*.npy"))
        self._array = lru_cache(maxsize=OPEN_ARRAYS)(self._open)
        self._bytes = lru_cache(maxsize=OPEN_ARRAYS)(self._view)
        self._starts = np.cumsum([0, *(len(self._open(n, "keys")) for n in range(len(self._names)))])
        self._damaged, self._weighted = self._shards_with("rows"), self._shards_with("caption_weights")

    def __reduce__(self) -> Any:
        return partial(FeatureDataset, split=self.split), (self.folder,)

    def __len__(self) -> int:
        """The samples of all shards."""
        return int(self._starts[-1])

    @property
    def keys(self) -> list[str]:
        """The keys of all samples in order."""
        return [str(key) for shard in range(len(self._names)) for key in self._array(shard, "keys")]

    @property
    def variants(self) -> int:
        """How many versions of each image are cached: 1, or 2 with its mirror image."""
        images = self.arrays.intersection(VARIANT_ARRAYS)
        return int(self._array(0, min(images)).shape[1]) if images else 1

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._array(0, "latents").shape[2:]

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
        offsets = {shard: self._array(shard, "token_offsets").data for shard in set(shards.tolist())}
        of_batch = list(zip(shards.tolist(), captions.tolist(), strict=True))
        starts = np.asarray([offsets[shard][caption] for shard, caption in of_batch], np.int64)
        stops = np.asarray([offsets[shard][caption + 1] for shard, caption in of_batch], np.int64)
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
            # Maps of their own: those that the dataset keeps open would stay in memory.
            embeds, places = self._open(shard, name), np.arange(self._starts[shard + 1] - self._starts[shard])
            if shard in self._damaged:
                places = self._open(shard, "rows")
            if name == "text_embeds":
                places = self._open(shard, "caption_offsets")[places]
            for first in range(0, len(places), size):
                some = embeds[places[first : first + size]]
                yield torch.from_numpy(some[:, 0] if name in VARIANT_ARRAYS else some)

    def null_text(self) -> dict[str, torch.Tensor]:
        """The empty caption as `text` gives others, B = 1: what a dropped caption is replaced by."""
        files = (self.folder / NULL_TEXT).glob("*.npy")
        arrays = {path.stem: torch.from_numpy(np.load(path, allow_pickle=False)) for path in files}
        if "token_offsets" in arrays:
            arrays["text_places"] = _token_places(arrays.pop("token_offsets").diff().numpy())
        return arrays

    def verify_alignment(self, shards: ShardDataset) -> None:
        """Raise ValueError unless `shards` has the same sample, with as many captions, at every index."""
        if self.shards() != shards.shards():
            raise ValueError(f"{self.folder} was not made from {shards.folder}: other shards; cache again")
        for number, name in enumerate(self._names):
            rows = shards.rows(name)
            same = [shards.key(i) for i in rows] == self._array(number, "keys").tolist()
            if "caption_offsets" in self.arrays:
                counts = np.diff(self._array(number, "caption_offsets")).tolist()
                same = same and [len(shards.captions(i)) for i in rows] == counts
            if not same:
                where = self.folder / name
                raise ValueError(f"{where} holds other samples than {shards.folder / name}.tar; cache again")

    def _open(self, shard: int, name: str) -> np.ndarray:
        # As a plain array on the map: numpy's own class for maps is slow to index.
        return np.asarray(np.load(self.folder / self._names[shard] / f"{name}.npy", mmap_mode="r", allow_pickle=False))

    def _shards_with(self, name: str) -> set[int]:
        return {n for n, shard in enumerate(self._names) if (self.folder / shard / f"{name}.npy").exists()}

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each index, and the row there that stands for it."""
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"samples {indices.min()} to {indices.max()} of {len(self)}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[shards]
        for shard in self._damaged.intersection(shards.tolist()) if self._damaged else ():
            there = shards == shard
            rows[there] = self._array(shard, "rows")[rows[there]]
        return shards, rows

    def _versions(self, indices: np.ndarray, variants: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each image, and its place among all variants of all rows there."""
        shards, rows = self._places(indices)
        places = rows * self.variants
        return shards, places if variants is None else places + variants

    def _captions(self, shards: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """int64 [B]: where the caption of each row stands, in its shard, on which the draw falls."""
        offsets = {shard: self._array(shard, "caption_offsets").data for shard in set(shards.tolist())}
        captions = []
        for shard, row, draw in zip(shards.tolist(), rows.tolist(), draws.tolist(), strict=True):
            first, stop = offsets[shard][row], offsets[shard][row + 1]
            weights = self._array(shard, "caption_weights")[first:stop] if shard in self._weighted else None
            captions.append(first + pick(draw, count=stop - first, weights=weights))
        return np.asarray(captions, np.int64)

    def _gather(
        self, name: str, shards: np.ndarray, starts: np.ndarray, *, stops: np.ndarray | None = None
    ) -> torch.Tensor:
        """An array's entries at these places of the shards, [B, ...]; or those from `starts` to `stops`, joined.

        Their bytes are joined: a batch meets most shards once or twice, and indexing costs more than copying.
        """
        kind, shape = self._entry(name)
        stride = kind.itemsize * math.prod(shape)
        bytes_of = {shard: self._bytes(shard, name) for shard in set(shards.tolist())}
        stops = starts + 1 if stops is None else stops
        spans = zip(shards.tolist(), (starts * stride).tolist(), (stops * stride).tolist(), strict=True)
        joined = np.frombuffer(bytearray().join([bytes_of[shard][at:stop] for shard, at, stop in spans]), kind)
        return torch.from_numpy(joined.reshape(-1, *shape))

    def _entry(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """The dtype and the shape of one entry of an array."""
        array = self._array(0, name)
        return array.dtype, array.shape[2 if name in VARIANT_ARRAYS else 1 :]

    def _view(self, shard: int, name: str) -> memoryview:
        """An array's bytes. Raises ValueError if a row of them is not to be read as one of the first shard."""
        array, first = self._array(shard, name), self._array(0, name)
        if (array.dtype, array.shape[1:]) != (first.dtype, first.shape[1:]):
            where = self.folder / self._names[shard] / f"{name}.npy"
            held = f"{array.dtype} {array.shape[1:]} a row, other shards {first.dtype} {first.shape[1:]}"
            raise ValueError(f"{where} holds {held}; cache again")
        return array.data.cast("B")


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
