"""Byte-level BPE trained on the captions: any text in, no unknown token, ids fixed by one JSON file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, BOS, EOT = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
PAD_ID, BOS_ID, EOT_ID = 0, 1, 2
MIN_VOCAB_SIZE = 256 + 3  # every byte and the three above


class CaptionTokenizer:
    """Captions to fixed-length token ids: `BOS ids... EOT PAD...`; lower-cased, as CLIP does.

    Shape legend: B captions, L tokens (the context length).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A caption that spells a special token is a caption, not a command.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    def __reduce__(self) -> Any:
        return CaptionTokenizer, (self._tokenizer,)  # its own pickling forgets encode_special_tokens

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def digest(self) -> str:
        """sha256 of the JSON: two tokenizers with one digest give the same ids."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode_batch(self, captions: list[str], *, context_length: int) -> np.ndarray:
        """int64 [B, L]. Longer captions are cut so that EOT stays, as a pooled text embed is read there."""
        tokens_BL = np.full((len(captions), context_length), PAD_ID, np.int64)
        for row, encoding in zip(
            tokens_BL, self._tokenizer.encode_batch(captions, add_special_tokens=False), strict=True
        ):
            ids = [BOS_ID, *encoding.ids[: context_length - 2], EOT_ID]
            row[: len(ids)] = ids
        return tokens_BL

    def encode_short(self, captions: list[str], *, context_length: int) -> np.ndarray:
        """As `encode_batch`, without the columns that are padding for every caption of the batch."""
        tokens_BL = self.encode_batch(captions, context_length=context_length)
        return tokens_BL[:, : self.lengths(tokens_BL).max()]

    @staticmethod
    def lengths(tokens_BL: np.ndarray) -> np.ndarray:
        """int64 [B]: tokens of each caption, BOS and EOT included; EOT stands at `length - 1`."""
        lengths_B: np.ndarray = (tokens_BL != PAD_ID).sum(axis=1)
        return lengths_B

    def decode(self, ids: Iterable[int]) -> str:
        """The (lower-cased) text of token ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write the JSON."""
        path.write_text(self._tokenizer.to_str(), "utf-8")

    @classmethod
    def load(cls, path: Path) -> CaptionTokenizer:
        """Read what `save` wrote."""
        return cls(Tokenizer.from_str(path.read_text("utf-8")))


def train_tokenizer(captions: Iterable[str], *, vocab_size: int) -> CaptionTokenizer:
    """Byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of at most `vocab_size` tokens.

    The same captions, in any order, give the same digest. Raises ValueError for a vocabulary below 259, which
    has no room for every byte.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; byte-level BPE needs at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return CaptionTokenizer(tokenizer)
