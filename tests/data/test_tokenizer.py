from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpipe.data.tokenizer import BOS_ID, EOT_ID, PAD_ID, CaptionTokenizer, train_tokenizer

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
