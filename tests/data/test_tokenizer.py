"""The trained tokenizer by its properties; CLIP's own against transformers and against the algorithm in Python."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import subprocess
import sys
import unicodedata
from functools import lru_cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from genpipe.data.samples import clean_captions
from genpipe.data.tokenizer import (
    BOS_ID,
    CLIP_EOT_ID,
    CLIP_VOCAB_SIZE,
    EOT_ID,
    PAD_ID,
    SPECIAL,
    CaptionTokenizer,
    clip_tokenizer,
    train_tokenizer,
)

CAPTIONS = ["a red apple", "a green apple", "the flag of France", "caf\u00e9 \U0001f34e", "two hearts"] * 3
TOKENIZER = train_tokenizer(CAPTIONS, vocab_size=300)


def test_every_text_round_trips_in_lower_case() -> None:
    tokens = TOKENIZER.encode_batch(
        ["A Red APPLE", "\U0001f34e, caf\u00e9?", "never seen: \u4f60\u597d"], context_length=64
    )
    assert [TOKENIZER.decode(row) for row in tokens] == [
        "a red apple",
        "\U0001f34e, caf\u00e9?",
        "never seen: \u4f60\u597d",
    ]


def test_layout_padding_and_lengths() -> None:
    tokens = TOKENIZER.encode_batch(["a red apple", ""], context_length=16)
    lengths = TOKENIZER.lengths(tokens)
    assert tokens.shape == (2, 16) and tokens.dtype == np.int64
    assert tokens[1].tolist() == [BOS_ID, EOT_ID] + [PAD_ID] * 14 and lengths[1] == 2
    assert tokens[0, 0] == BOS_ID and tokens[0, lengths[0] - 1] == EOT_ID
    assert (tokens[0, lengths[0] :] == PAD_ID).all() and (tokens[0, : lengths[0]] != PAD_ID).all()


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_a_prompt_gives_the_tokens_of_the_caption_of_the_same_text(text: str) -> None:
    stored = clean_captions([text]) or ("",) * (not text.strip())
    for caption in stored:
        prompt, expected = TOKENIZER.encode_batch([text, caption], context_length=64)
        assert (prompt == expected).all()


def test_spaces_and_accents_of_a_prompt_make_no_difference() -> None:
    tokens = TOKENIZER.encode_batch(["a  red\tapple ", "a red apple", "cafe\u0301", "caf\u00e9"], context_length=16)
    assert (tokens[0] == tokens[1]).all() and (tokens[2] == tokens[3]).all()
    with pytest.raises(ValueError, match="too long"):
        TOKENIZER.encode_batch(["a" * 2**20], context_length=16)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.to_transformers(folder, context_length=24)
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from(["<|endoftext|> a cat", "a\x00b\tc", "\u2003a  b ", "a " * 40]))
def test_transformers_gives_the_same_tokens_with_the_special_ones_last(exported: Any, text: str) -> None:
    [expected] = TOKENIZER.encode_batch([text], context_length=24)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    [found] = exported([text], **options)["input_ids"]
    assert (found == (expected - SPECIAL) % TOKENIZER.vocab_size).all()


def test_lengths_before_the_cut_tell_what_is_cut() -> None:
    texts = ["", "a red apple", "never seen: \u4f60\u597d"]
    whole, lengths = TOKENIZER.encode_and_measure(texts, context_length=64)
    assert lengths.tolist() == TOKENIZER.lengths(whole).tolist()
    context = int(lengths[1])
    cut, again = TOKENIZER.encode_and_measure(texts, context_length=context)
    assert (again == lengths).all() and (again > context).tolist() == [False, False, True]
    assert (cut[:2] == whole[:2, :context]).all() and TOKENIZER.lengths(cut).max() == context


def test_a_pickled_tokenizer_still_takes_special_tokens_for_text() -> None:
    captions = ["an <|endoftext|> apple", "a red apple"]
    again = pickle.loads(pickle.dumps(TOKENIZER))
    expected = TOKENIZER.encode_batch(captions, context_length=32)
    assert (expected == EOT_ID).sum(1).tolist() == [1, 1]
    assert (again.encode_batch(captions, context_length=32) == expected).all()


@settings(max_examples=50, deadline=None)
@given(text=st.text(), context_length=st.integers(2, 20))
def test_truncation_keeps_the_end_token(text: str, context_length: int) -> None:
    tokens = TOKENIZER.encode_batch([text], context_length=context_length)
    (length,) = TOKENIZER.lengths(tokens)
    assert tokens[0, 0] == BOS_ID and tokens[0, length - 1] == EOT_ID
    assert not np.isin(tokens[0, 1 : length - 1], [PAD_ID, BOS_ID, EOT_ID]).any()
    assert tokens.max() < TOKENIZER.vocab_size


def test_a_caption_cannot_spell_a_special_token(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, CaptionTokenizer.load(tmp_path / "tokenizer.json")):
        tokens = tokenizer.encode_batch(["a <|endoftext|> b <|pad|>"], context_length=64)
        assert (tokens == EOT_ID).sum() == 1
        assert tokenizer.decode(tokens[0]) == "a <|endoftext|> b <|pad|>"


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = CaptionTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == TOKENIZER.digest and loaded.vocab_size == TOKENIZER.vocab_size
    encoded = [t.encode_batch(CAPTIONS, context_length=12) for t in (loaded, TOKENIZER)]
    assert (encoded[0] == encoded[1]).all()


def test_merges_shorten_what_was_seen() -> None:
    (length,) = TOKENIZER.lengths(TOKENIZER.encode_batch(["a red apple"], context_length=32))
    assert length < 2 + len("a red apple") / 2
    assert TOKENIZER.vocab_size <= 300


def test_training_depends_on_the_captions_only() -> None:
    assert train_tokenizer(reversed(CAPTIONS), vocab_size=300).digest == TOKENIZER.digest
    assert train_tokenizer([*CAPTIONS, "zebra zebra zebra"], vocab_size=300).digest != TOKENIZER.digest
    code = (
        "from genpipe.data.tokenizer import train_tokenizer;"
        f"print(train_tokenizer({CAPTIONS!a}, vocab_size=300).digest)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == TOKENIZER.digest


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 258; byte-level BPE needs at least 259"):
        train_tokenizer(CAPTIONS, vocab_size=258)


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no <\|startoftext\|>; use the one"):
        CaptionTokenizer(Tokenizer(models.BPE()))


# --- CLIP's own ---

VOCABULARY = Path(metadata.distribution("open-clip-torch").locate_file("open_clip/bpe_simple_vocab_16e6.txt.gz"))
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
PUBLISHED = [
    "a photo of a cat",
    "A Photo  of\tan elephant,\nstanding!!",
    "it's 2024: they've 1,234 cats & I'd've none",
    "caf\u00e9 cafe\u0301 na\u00efve \u0130stanbul \ufb01sh",
    "\u732b\u3068\u72ac \u0645\u0631\u062d\u0628\u0627 \u041f\u0440\u0438\u0432\u0435\u0442 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f34e\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00bd \u2082 \u2167 x\u00b2",
    "photo.jpg http://example.org/a_b?c=d#e -- (c) 1999",
    "",
    "   ",
    "antidisestablishmentarianism" * 4,
]


@pytest.fixture(scope="module")
def clips_own() -> CaptionTokenizer:
    return clip_tokenizer(VOCABULARY, sha256=SHA256)


@lru_cache(maxsize=1)
def openai() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """OpenAI's token ids and merge ranks, put together as in openai/CLIP's simple_tokenizer.py."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(vocabulary)}, {(a, b): i for i, (a, b) in enumerate(merges)}


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def openai_ids(text: str) -> list[int]:
    """Byte pair encoding (Sennrich et al. 2016, alg. 1) of each word: join the pair of lowest rank until none is."""
    ids, ranks = openai()
    letters = bytes_to_unicode()
    found = []
    text = " ".join(text.split()).lower()
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", text, regex.IGNORECASE):
        parts = [letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        found += [ids[part] for part in parts]
    return found


def caption_ids(tokenizer: CaptionTokenizer, text: str) -> list[int]:
    tokens = tokenizer.encode_batch([text], context_length=2000)
    return tokens[0, 1 : tokenizer.lengths(tokens)[0] - 1].tolist()


def test_clips_ids_as_published(clips_own: CaptionTokenizer) -> None:
    """From the documentation of openai/CLIP and transformers."""
    tokens = clips_own.encode_batch(["a photo of a cat", "a photo of a dog"], context_length=77)
    assert tokens.shape == (2, 77)
    assert tokens[:, :8].tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407, 0],
        [49406, 320, 1125, 539, 320, 1929, 49407, 0],
    ]
    assert clips_own.vocab_size == CLIP_VOCAB_SIZE and clips_own.eot_id == CLIP_EOT_ID
    assert clips_own.lengths(tokens).tolist() == [7, 7]


@pytest.mark.parametrize(
    "text", [*PUBLISHED, "'S 'LL don'T ''s", "'\u017f it'\u017f '\u212a", "\u00a0wide\u3000spaces\u2028here"]
)
def test_clips_ids_are_the_algorithms(clips_own: CaptionTokenizer, text: str) -> None:
    assert caption_ids(clips_own, text) == openai_ids(unicodedata.normalize("NFC", text))


WRITTEN = st.text(st.characters(categories=["Ll", "Lo", "Nd", "Po", "Ps", "Sc", "So", "Zs"], max_codepoint=0x1FAFF))


@settings(max_examples=200, deadline=None)
@given(text=WRITTEN | st.text("abcdefgh' st0123.,!-", min_size=1))
def test_clips_ids_of_any_caption_are_the_algorithms(clips_own: CaptionTokenizer, text: str) -> None:
    assert caption_ids(clips_own, text) == openai_ids(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("text", PUBLISHED)
def test_clips_ids_are_those_of_transformers(clips_own: CaptionTokenizer, text: str) -> None:
    """Padded and cut as well; transformers pads with the end of text, we as OpenAI with 0."""
    theirs = transformers_tokenizer()([text], padding="max_length", truncation=True, max_length=20)
    ours = clips_own.encode_batch([text], context_length=20)
    length = clips_own.lengths(ours)[0]
    assert length == sum(theirs["attention_mask"][0])
    assert ours[0, :length].tolist() == theirs["input_ids"][0][:length]
    assert not ours[0, length:].any()
    assert clips_own.lengths(np.array(theirs["input_ids"])).tolist() == [length], "the first end of text counts"


@lru_cache(maxsize=1)
def transformers_tokenizer():  # type: ignore[no-untyped-def]
    from transformers import CLIPTokenizer

    ids, ranks = openai()
    return CLIPTokenizer(vocab=ids, merges=list(ranks))


def test_clips_captions_come_back_in_words(clips_own: CaptionTokenizer, tmp_path: Path) -> None:
    clips_own.save(tmp_path / "tokenizer.json")
    loaded = CaptionTokenizer.load(tmp_path / "tokenizer.json")
    captions = ["A red Apple", "caf\u00e9 \U0001f34e", "never seen: \u4f60\u597d", "an <|endoftext|> apple"]
    for tokenizer in (clips_own, loaded, pickle.loads(pickle.dumps(clips_own))):
        tokens = tokenizer.encode_batch(captions, context_length=24)
        assert (tokens == CLIP_EOT_ID).sum(1).tolist() == [1] * 4, "a caption cannot spell a special token"
        assert [tokenizer.decode(row) for row in tokens] == [
            "a red apple",
            "caf\u00e9 \U0001f34e",
            "never seen : \u4f60\u597d",
            "an <| endoftext |> apple",
        ]
        assert tokenizer.digest == clips_own.digest


def test_another_vocabulary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.vocabulary: .*absent.gz cannot be read .No such file"):
        clip_tokenizer(tmp_path / "absent.gz", sha256=SHA256)
    other = tmp_path / "other.gz"
    other.write_bytes(gzip.compress(b"#version: 0.2\ni n\n"))
    with pytest.raises(ValueError, match=f"has the sha256 {hashlib.sha256(other.read_bytes()).hexdigest()}, not 9246"):
        clip_tokenizer(other, sha256=SHA256)
    for content in (b"#version\ni n\n", gzip.compress(b"#version\none two three\n"), gzip.compress(b"\n\xff \xff")):
        other.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"tokenizer.vocabulary: .* is not a gzipped list of merges \(.*give CLIP's"
        ):
            clip_tokenizer(other, sha256=hashlib.sha256(content).hexdigest())
