"""What of a system's parts is released with it."""

from __future__ import annotations

from pathlib import Path

from genpipe import artifacts
from genpipe.artifacts import ASIDE, Artifact
from genpipe.generation.released import SYSTEM_FILE, copy_system


def test_parts_come_without_pictures_and_without_what_lies_aside(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for name in ("weights.safetensors", "preview.png", f"{ASIDE}averages/1.safetensors"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    identity = artifacts.identity("decoder", version=1, settings={}, inputs={})
    target = Artifact(kind="decoder", uri=str(tmp_path / "decoder"), fingerprint=artifacts.fingerprint(identity))
    part = artifacts.commit(target, folder=made, identity=identity, config={}, inputs={}, metrics={})
    copy_system({"kind": "pixel"}, {"decoder": part}, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {SYSTEM_FILE, "weights.safetensors"}
