"""Whether artifacts belong together, by fingerprint and by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.lineage import check_lineage, check_made_from, clips_behind, clips_content_behind, content_digest


def part(kind: str, fingerprint: str, **meta: Any) -> Artifact:
    return Artifact(kind=kind, uri="", fingerprint=fingerprint * 16, meta=meta)


def test_parts_that_were_not_trained_for_one_another() -> None:
    clip, autoencoder = part("clip", "c1"), part("autoencoder", "a1", image_size=64)
    features = part("features", "f1", clip=clip.fingerprint, autoencoder=autoencoder.fingerprint)
    whole = {"clip": clip, "autoencoder": autoencoder, "features": features}
    check_lineage(whole)
    check_lineage({**whole, "upsamplers.0": part("upsampler", "u1", low_size=64)})
    stranger = {"clip": part("clip", "c2")}
    latents = {"upsamplers.0": part("upsampler", "u1", autoencoder="a2" * 16)}
    for inputs, names in (
        ({**whole, **stranger}, ("features", "clip", "c1c1c1c1c1c1", "c2c2c2c2c2c2")),
        ({**whole, **latents}, ("upsamplers.0", "autoencoder", "a2a2a2a2a2a2", "a1a1a1a1a1a1")),
    ):
        with pytest.raises(ValueError) as error:
            check_lineage(inputs)
        assert all(name in str(error.value) for name in names), error.value


def committed(folder: Path, content: str, **meta: Any) -> Artifact:
    """An artifact of one file; its fingerprint knows nothing of the content."""
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "weights").write_text(content)
    identity = {"name": folder.name}
    planned = Artifact(
        kind="clip", uri=str(folder / "artifact"), fingerprint=artifacts.fingerprint(identity), meta=meta
    )
    return artifacts.commit(planned, folder=folder / "files", identity=identity, config={}, inputs={}, metrics={})


def test_what_was_made_from_another_content_is_refused(tmp_path: Path) -> None:
    """The same fingerprint, trained again on other hardware."""
    clip, again = committed(tmp_path / "one/clip", "weights"), committed(tmp_path / "other/clip", "other weights")
    assert clip.fingerprint == again.fingerprint
    decoder = committed(tmp_path / "decoder", "d", made_from={"clip": content_digest(clip), "shard": "s" * 64})
    check_made_from({"decoder": decoder, "clip": clip})
    with pytest.raises(ValueError) as error:
        check_made_from({"decoder": decoder, "clip": again})
    named = ("decoder", decoder.uri, again.uri, content_digest(clip)[:12], content_digest(again)[:12])
    assert all(name in str(error.value) for name in named), error.value


def test_pictures_are_no_content(tmp_path: Path) -> None:
    made = committed(tmp_path / "one/clip", "weights")
    (tmp_path / "other/clip/files").mkdir(parents=True)
    (tmp_path / "other/clip/files/preview.png").write_bytes(b"picture")
    (tmp_path / "other/clip/files/weights").write_text("weights")
    identity = {"name": "clip"}
    planned = made.model_copy(update={"uri": str(tmp_path / "other/clip/artifact")})
    folder = tmp_path / "other/clip/files"
    other = artifacts.commit(planned, folder=folder, identity=identity, config={}, inputs={}, metrics={})
    assert content_digest(other) == content_digest(made)


def test_the_clips_behind_samples_are_known_before_anything_is_made() -> None:
    """By the parts that are CLIPs, and by those that were trained with one."""
    parts = [part("clip", "c1"), part("prior", "p1", clip="c1" * 16), part("decoder", "d1", clip="c2" * 16)]
    assert clips_behind(*parts, part("autoencoder", "a1")) == {"c1" * 16, "c2" * 16}
    samples = part("samples", "s1", clips=sorted(clips_behind(*parts)))
    assert clips_behind(samples) == {"c1" * 16, "c2" * 16}
    assert clips_behind(part("samples", "s2", clips=[])) == frozenset()


def test_the_clips_behind_older_samples_are_those_of_their_manifests(tmp_path: Path) -> None:
    """Of a system that was committed without `clips` in its meta."""

    def made(kind: str, inputs: dict[str, Artifact], **meta: Any) -> Artifact:
        (folder := tmp_path / kind).mkdir()
        identity = artifacts.identity(kind, version=1, settings={}, inputs=inputs)
        fingerprint = artifacts.fingerprint(identity)
        planned = Artifact(kind=kind, uri=str(tmp_path / "made" / kind), fingerprint=fingerprint, meta=meta)
        return artifacts.commit(planned, folder=folder, identity=identity, config={}, inputs=inputs, metrics={})

    clip = made("clip", {})
    system = made("system", {"clip": clip}, made_from={"clip": content_digest(clip)})
    samples = made("samples", {"system": system})
    assert clips_behind(samples) == {clip.fingerprint}
    assert clips_content_behind(samples) == {content_digest(clip)}
    gone = samples.model_copy(update={"uri": str(tmp_path / "gone")})
    assert clips_behind(gone) == clips_content_behind(gone) == frozenset()
