"""Systems of any kind: what they promise, and how one is loaded from its artifact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from genpipe.artifacts import Artifact, ManifestError, commit, read_manifest
from genpipe.generation.systems import Conditions, SystemConfig, check_system, load_system

if TYPE_CHECKING:
    from conftest import TinyPipeline

CPU = torch.device("cpu")
adapter: TypeAdapter[Any] = TypeAdapter(SystemConfig)


@pytest.fixture(scope="module")
def system(tiny: TinyPipeline) -> Artifact:
    return tiny.run("system")


def parts(system: Artifact) -> dict[str, Artifact]:
    manifest = read_manifest(system.uri)
    assert manifest is not None
    return dict(manifest.inputs)


def test_the_default_kind_is_unclip() -> None:
    assert adapter.validate_python({}).kind == "unclip"
    assert adapter.validate_python({"kind": "pixel"}).roles().keys() == {"decoder", "upsamplers"}


def test_a_system_is_loaded_from_its_uri_alone(system: Artifact) -> None:
    loaded = load_system(Artifact(kind="system", uri=system.uri, fingerprint=system.fingerprint), device=CPU)
    assert (loaded.size, loaded.conditioned_on, loaded.classes) == (32, {"text"}, ())
    pictures = loaded.sample(
        Conditions(2, texts=["a small red circle", "a large blue bar"]), generator=torch.Generator().manual_seed(0)
    )
    assert pictures.shape == (2, 3, 32, 32) and pictures.dtype == torch.float32 and pictures.abs().max() <= 1


def test_parts_of_other_trainings_are_refused_by_their_fingerprints(system: Artifact) -> None:
    given = parts(system)
    stranger = given["clip"].model_copy(update={"fingerprint": "0" * 64, "uri": "/nowhere"})
    with pytest.raises(ValueError, match="was made with clip"):
        check_system(adapter.validate_python({}), {**given, "clip": stranger})


def test_a_part_that_was_trained_again_is_refused(tiny: TinyPipeline, system: Artifact, tmp_path: Path) -> None:
    """A moved store works; a decoder of the same fingerprint and other weights in it does not."""
    copy = tmp_path / "store"
    shutil.copytree(Path(tiny.store) / "artifacts", copy / "artifacts")
    moved = str(copy / Path(system.uri).relative_to(tiny.store))
    load_system(Artifact(kind="system", uri=moved, fingerprint=system.fingerprint), device=CPU)
    decoder = read_manifest(str(copy / Path(parts(system)["decoder"].uri).relative_to(tiny.store)))
    assert decoder is not None
    folder = tmp_path / "decoder"
    shutil.copytree(decoder.artifact.uri, folder, ignore=shutil.ignore_patterns("manifest.json"))
    weights = load_file(folder / "weights.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "weights.safetensors")
    record = {"identity": decoder.identity, "config": decoder.config, "inputs": decoder.inputs, "metrics": {}}
    (Path(decoder.artifact.uri) / "manifest.json").unlink()  # it is never replaced
    commit(decoder.artifact, folder=folder, **record)
    with pytest.raises(ValueError, match=r"system: .* was made from another decoder"):
        load_system(Artifact(kind="system", uri=moved, fingerprint=system.fingerprint), device=CPU)


def test_nothing_is_loaded_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="nothing was committed"):
        load_system(Artifact(kind="system", uri=str(tmp_path), fingerprint="f" * 64), device=CPU)
