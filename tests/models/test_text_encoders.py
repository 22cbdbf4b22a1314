"""T5 and CLIP's text tower from published files, against transformers at random weights, and what is refused."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from genpipe.models.text_encoders import TextEncoderConfig, load_text_encoder, write_record

CPU = torch.device("cpu")
WORDS = ["a", "red", "cat", "blue", "dog", "and", "on", "the", "mat"]
TEXTS = ["a red cat", "the blue dog and the red cat on the mat", "", "zebra </s> <end>"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTEXT = 8
"""Shorter than the second text."""


def tokenizer(*, first: list[str], last: str) -> Tokenizer:
    """Words, with `first` and `last` around them as the published tokenizers have theirs."""
    special = ["<pad>", last, *first]
    vocabulary = {word: i for i, word in enumerate([*special, "<unk>", *WORDS, "</", "s", ">", "<", "end"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    around = [(token, vocabulary[token]) for token in (*first, last)]
    made.post_processor = processors.TemplateProcessing(single=" ".join([*first, "$A", last]), special_tokens=around)
    return made


def write_t5(folder: Path, **saving: Any) -> dict[str, Any]:
    """A whole T5, encoder and decoder, as published; and what a config says of it."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes, **gated)).save_pretrained(folder, **saving)
    tokenizer(first=[], last="</s>").save(str(folder / "tokenizer.json"))
    return {"kind": "t5", "folder": str(folder), "width": 32, "context_length": CONTEXT}


def write_clip(folder: Path) -> dict[str, Any]:
    """A whole CLIP, both towers, as published; and what a config says of it."""
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 32, "max_position_embeddings": 20, "bos_token_id": 2, "eos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 16, "patch_size": 8})).save_pretrained(
        folder
    )
    tokenizer(first=["<start>"], last="<end>").save(str(folder / "tokenizer.json"))
    return {"kind": "clip_text", "folder": str(folder), "width": 32, "context_length": CONTEXT}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.name not in ("generation_config.json", "text_encoder.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def config(settings: dict[str, Any], **changes: Any) -> Any:
    whole = {**settings, "sha256": digests(Path(settings["folder"])), **changes}
    return TypeAdapter(TextEncoderConfig).validate_python(whole)


def expected(kind: str, folder: Path) -> tuple[Tensor, Tensor]:
    """What transformers makes of the texts, with its tokenizer and its masks."""
    reader = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", split_special_tokens=True
    )
    tokens = reader(TEXTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    network = (T5EncoderModel if kind == "t5" else CLIPTextModel).from_pretrained(folder).eval()
    with torch.no_grad():
        states = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states, tokens.attention_mask.bool()


@pytest.mark.parametrize(
    ("write", "saving"), [(write_t5, {}), (write_t5, {"max_shard_size": "20KB"}), (write_clip, {})]
)
def test_encodings_are_those_of_transformers(write: Any, saving: dict[str, Any], tmp_path: Path) -> None:
    settings = write(tmp_path, **saving)
    write_record(config(settings), tmp_path)
    encoder = load_text_encoder(tmp_path, device=CPU)
    encodings, text_mask = encoder.encode(TEXTS)
    states, real = expected(settings["kind"], tmp_path)
    assert torch.equal(text_mask, real)
    assert encodings.shape == (len(TEXTS), CONTEXT, encoder.width)
    torch.testing.assert_close(encodings[text_mask], states[real])
    assert not encodings[~text_mask].any() and encodings[text_mask].std() > 0.01
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    alone, mask = encoder.encode(TEXTS[2:3])
    assert mask.all() and alone.shape[1] == (1 if settings["kind"] == "t5" else 2), "the special tokens alone"
    torch.testing.assert_close(alone[0], encodings[2][text_mask[2]])


def test_bfloat16_halves_the_weights_and_is_near(tmp_path: Path) -> None:
    settings = write_t5(tmp_path)
    write_record(config(settings), tmp_path)
    exact, _ = load_text_encoder(tmp_path, device=CPU).encode(TEXTS)
    write_record(config(settings, dtype="bfloat16"), tmp_path)
    encoder = load_text_encoder(tmp_path, device=CPU)
    half, _ = encoder.encode(TEXTS)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).square().mean() < 1e-3 * exact.square().mean()
    assert encoder.network.shared.weight.dtype == torch.bfloat16


def test_incomplete_or_unsafe_lists_of_files_are_refused(tmp_path: Path) -> None:
    settings = write_t5(tmp_path)
    known = digests(tmp_path)
    digest = known["config.json"]
    for changed, message in (
        ({"pytorch_model.bin": digest}, r"pytorch_model\.bin.*unpickle"),
        ({"../model.safetensors": digest}, r"\.\./model\.safetensors"),
        ({"more.safetensors": digest}, r"model\.safetensors\.index\.json"),
    ):
        with pytest.raises(ValidationError, match=message):
            config(settings, sha256=known | changed)
    for name, message in (("tokenizer.json", r"tokenizer\.json.*digest"), ("model.safetensors", "safetensors")):
        with pytest.raises(ValidationError, match=message):
            config(settings, sha256={key: value for key, value in known.items() if key != name})


def test_files_that_are_not_what_the_config_says_are_refused(tmp_path: Path) -> None:
    settings = write_clip(tmp_path)
    for changes, message in (
        ({"width": 16}, r"model\.width.*32, not 16"),
        ({"context_length": 21}, r"model\.context_length.*20 positions"),
        ({"kind": "t5"}, r"model\.kind.*clip"),
    ):
        write_record(config(settings, **changes), tmp_path)
        with pytest.raises(ValueError, match=message):
            load_text_encoder(tmp_path, device=CPU)


def test_weights_that_lack_tensors_are_refused(tmp_path: Path) -> None:
    settings = write_t5(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_layers": 3}))
    write_record(config(settings), tmp_path)
    with pytest.raises(ValueError, match=r"lack encoder\.block\.2"):
        load_text_encoder(tmp_path, device=CPU)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = write_t5(tmp_path)
    write_record(config(settings), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"genpipe\[text-encoders\]"):
        load_text_encoder(tmp_path, device=CPU)
