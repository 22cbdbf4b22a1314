"""A text encoder's files become an artifact that needs nothing else, and other files do not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from genpipe.stages import load_stage, text_encoder

NETWORK = {"model_type": "t5", "d_model": 16}
FILES = {"config.json": json.dumps(NETWORK).encode(), "tokenizer.json": b"{}", "model.safetensors": b"weights"}


def config(folder: Path) -> text_encoder.Config:
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    model = {"kind": "t5", "folder": str(folder), "sha256": sha256, "width": 16, "context_length": 8}
    return text_encoder.Config.model_validate({"model": model})


def test_the_files_are_copied_and_recorded(tmp_path: Path) -> None:
    cfg, out = config(tmp_path / "published"), tmp_path / "out"
    assert load_stage("text_encoder") is text_encoder and text_encoder.roles(cfg) == {}
    out.mkdir()
    worker = text_encoder.Worker(cfg, {})
    results = [worker(part, out) for part in text_encoder.parts(cfg, {})]
    meta, metrics = text_encoder.finalize(cfg, {}, results, out)
    assert meta == text_encoder.check_inputs(cfg, {}) == {"text_width": 16, "context_length": 8}
    assert metrics == {"bytes": sum(map(len, FILES.values()))}
    assert {name: (out / name).read_bytes() for name in FILES} == FILES
    assert {path.name for path in out.iterdir()} == {*FILES, "text_encoder.json"}


def test_a_file_of_another_content_is_refused_and_left_out(tmp_path: Path) -> None:
    cfg, out = config(tmp_path / "published"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "published/model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"published/model\.safetensors: sha256 is"):
        text_encoder.Worker(cfg, {})("model.safetensors", out)
    assert not any(out.iterdir())


def test_a_width_that_is_not_the_networks_is_refused(tmp_path: Path) -> None:
    cfg, out = config(tmp_path / "published"), tmp_path / "out"
    out.mkdir()
    wrong = cfg.model_copy(update={"model": cfg.model.model_copy(update={"width": 32})})
    with pytest.raises(ValueError, match=r"model\.width.*set it to 16"):
        text_encoder.Worker(wrong, {})("config.json", out)
