"""Byte-level BPE, trained on the captions or published with CLIP: any text, no unknown token, one JSON file."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from genpipe.data.text import CONTROL, clean_text

PAD, BOS, EOT = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
PAD_ID, BOS_ID, EOT_ID = 0, 1, 2
SPECIAL = 3
"""Of tokenizers trained here. CLIP's own ends its vocabulary with start and end of text, and pads with 0."""

MIN_VOCAB_SIZE = 256 + 3  # every byte and the three above
CLIP_VOCAB_SIZE, CLIP_EOT_ID = 49_408, 49_407
CLIP_MERGES = CLIP_VOCAB_SIZE - 2 * 256 - 2  # beyond every byte, inside a word and at its end, and the two above
"""Merges that CLIP reads of its file, which holds many more."""

CLIP_WORDS = r"'[s\x{017F}]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's words, of captions in lower case. Its own pattern ignores case, in which the long s (U+017F) is an s."""


class CaptionTokenizer:
    """Texts to fixed-length token ids: `BOS ids... EOT PAD...`; lower-cased, as CLIP does.

    Every text goes through `clean_text`, so that a prompt gives the tokens of the caption that says the same.

    Shape legend: B texts, L tokens (the context length).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A caption that spells a special token is a caption, not a command.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.pad_id = tokenizer.token_to_id(PAD) or 0
        self.bos_id, self.eot_id = _id(tokenizer, BOS), _id(tokenizer, EOT)

    def __reduce__(self) -> Any:
        return CaptionTokenizer, (self._tokenizer,)  # its own pickling forgets encode_special_tokens

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def digest(self) -> str:
        """sha256 of the JSON: two tokenizers with one digest give the same ids."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode_batch(self, texts: list[str], *, context_length: int) -> np.ndarray:
        """int64 [B, L]. Longer texts are cut so that EOT stays, as a pooled text embed is read there.

        Raises ValueError for a text that `clean_text` refuses.
        """
        return self.encode_and_measure(texts, context_length=context_length)[0]

    def encode_and_measure(self, texts: list[str], *, context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_batch`; and the length of each text before it is cut, BOS and EOT included: int64 [B].

        A text is cut where its length is more than `context_length`.
        """
        tokens_BL = np.full((len(texts), context_length), self.pad_id, np.int64)
        encodings = self._tokenizer.encode_batch(list(map(clean_text, texts)), add_special_tokens=False)
        for row, encoding in zip(tokens_BL, encodings, strict=True):
            ids = [self.bos_id, *encoding.ids[: context_length - 2], self.eot_id]
            row[: len(ids)] = ids
        return tokens_BL, np.array([len(encoding.ids) + 2 for encoding in encodings], np.int64)

    def encode_short(self, texts: list[str], *, context_length: int) -> np.ndarray:
        """As `encode_batch`, without the columns that are padding for every text of the batch."""
        tokens_BL = self.encode_batch(texts, context_length=context_length)
        return tokens_BL[:, : self.lengths(tokens_BL).max()]

    def lengths(self, tokens_BL: np.ndarray) -> np.ndarray:
        """int64 [B]: tokens of each text as encoded, BOS and EOT included; the first EOT stands at `length - 1`."""
        lengths_B: np.ndarray = (tokens_BL == self.eot_id).argmax(axis=1) + 1
        return lengths_B

    def decode(self, ids: Iterable[int]) -> str:
        """The (lower-cased) text of token ids up to the end of text, special tokens left out.

        CLIP's own vocabulary knows where words end, but not whether a space followed: `a-b` becomes `a - b`.
        """
        caption = takewhile(lambda i: i != self.eot_id, map(int, ids))
        return self._tokenizer.decode(list(caption), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write the JSON."""
        path.write_text(self._tokenizer.to_str(), "utf-8")

    def to_transformers(self, folder: Path, *, context_length: int) -> None:
        """Write it as `PreTrainedTokenizerFast` of transformers reads it, which gives the same tokens.

        The special tokens of a tokenizer trained here are numbered last there, as its models expect it; see
        `models.interop.clip.special_tokens_last`.
        """
        record = json.loads(self._tokenizer.to_str())
        size = self.vocab_size
        first = SPECIAL if self.eot_id == EOT_ID else 0
        vocabulary = record["model"]["vocab"]
        record["model"]["vocab"] = {token: (i - first) % size for token, i in vocabulary.items()}
        for added in record["added_tokens"]:
            added["id"] = (added["id"] - first) % size
        theirs = Tokenizer.from_str(json.dumps(record))
        cleaning = [
            normalizers.NFC(),
            normalizers.Replace(Regex(CONTROL), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
        theirs.normalizer = normalizers.Sequence([*cleaning, theirs.normalizer])
        ends = [(token, _id(theirs, token)) for token in (BOS, EOT)]
        theirs.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOT}", special_tokens=ends)
        theirs.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            "bos_token": BOS,
            "eos_token": EOT,
            "pad_token": PAD if theirs.token_to_id(PAD) is not None else EOT,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CaptionTokenizer:
        """Read what `save` wrote."""
        return cls(Tokenizer.from_str(path.read_text("utf-8")))


def _id(tokenizer: Tokenizer, token: str) -> int:
    """Raises ValueError for a tokenizer that is not of this kind."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"not a tokenizer of captions: it has no {token}; use the one saved with the weights")
    return found


def train_tokenizer(captions: Iterable[str], *, vocab_size: int) -> CaptionTokenizer:
    """Byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of at most `vocab_size` tokens.

    The captions are taken as shards store them, cleaned. The same ones, in any order, give the same digest. Raises
    ValueError for a vocabulary below 259, which has no room for every byte.
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


def clip_tokenizer(vocabulary: Path, *, sha256: str) -> CaptionTokenizer:
    """CLIP's own tokenizer of 49,408 tokens, out of OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

    Gives the ids of OpenAI's tokenizer for captions that need no repair: OpenAI also unescapes HTML and mends broken
    encodings (ftfy), which is work for whoever prepares the captions; transformers leaves it out too. Raises
    ValueError if the file is missing or is another.
    """
    merges = _read_merges(vocabulary, sha256=sha256)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), BOS, EOT]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens([BOS, EOT])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(right=1)]
    )
    return CaptionTokenizer(tokenizer)


def _read_merges(vocabulary: Path, *, sha256: str) -> list[tuple[str, str]]:
    """The pairs that CLIP's BPE joins, in the order of priority."""
    try:
        packed = vocabulary.read_bytes()
    except OSError as error:
        raise ValueError(
            f"tokenizer.vocabulary: {vocabulary} cannot be read ({error.strerror}); give the path of CLIP's "
            "bpe_simple_vocab_16e6.txt.gz (github.com/openai/CLIP, or inside the open-clip-torch wheel)"
        ) from error
    if (found := hashlib.sha256(packed).hexdigest()) != sha256:
        raise ValueError(
            f"tokenizer.vocabulary: {vocabulary} has the sha256 {found}, not {sha256}; fetch it again, or set "
            "tokenizer.sha256 if this is the file that you mean"
        )
    try:
        lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + CLIP_MERGES]
        return [(first, second) for first, second in (line.split() for line in lines)]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(
            f"tokenizer.vocabulary: {vocabulary} is not a gzipped list of merges ({error}); give CLIP's "
            "bpe_simple_vocab_16e6.txt.gz"
        ) from error
