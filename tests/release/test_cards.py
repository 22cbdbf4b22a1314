"""The cards of manifests that are made up: intervals, gates, memorization, sources, and nothing that is private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genpipe.artifacts import Artifact, FileEntry, Manifest
from genpipe.release.cards import Known, Statements, data_card, model_card
from genpipe.release.record import Grid, GridPrompt, Machine

SAID = Statements("Apples", "MIT", "To look at.", "", {"mine": "CC0"})
GRID = Grid(prompts=(GridPrompt(text="a | b", label=-1),), each=1, seed=7, precision="fp32", threads=2)
META: dict[str, Any] = {
    "shards": {
        "samples": {"train": 1234, "heldout": 5},
        "rejected": {"too_small": 1000, "blocked": 2},
        "image_size": 64,
        "removed_from": ["f" * 64],
    },
    "system": {"kind": "pixel", "size": 64, "conditioned_on": ["text", "label"], "classes": ["red"]},
    "scores": {},
    "samples": {},
}


def manifest(kind: str, config: dict[str, Any] | None = None, metrics: dict[str, float] | None = None) -> Manifest:
    artifact = Artifact(kind=kind, uri=f"/store/{kind}", fingerprint=kind.ljust(64, "0"), meta=META[kind])
    return Manifest(
        artifact=artifact,
        identity={"stage": kind},
        config={"observe": {"gates": {}}, "model": {"kind": "pixel"}, **(config or {})},
        inputs={},
        metrics=metrics or {},
        files=(),
        created="2026-01-01T00:00:00+00:00",
    )


def known(
    *behind: Manifest,
    scores: Manifest | None = None,
    gone: tuple[Artifact, ...] = (),
    samples: tuple[Manifest, ...] = (),
) -> Known:
    return Known(manifest("system"), [scores] if scores else [], behind, gone, samples)


def card(scores: Manifest | None = None, *samples: Manifest) -> str:
    machine, of = Machine(torch="2", hardware="a machine"), known(scores=scores, samples=samples)
    return model_card(SAID, of, grid=GRID, machine=machine, elsewhere={}, folder=Path("/nowhere"))


def section(text: str, title: str) -> list[str]:
    """The lines below a heading."""
    return [line for line in text.split(f"{title}\n")[1].split("\n#")[0].splitlines() if line]


def test_metrics_have_their_intervals_and_gates_their_values() -> None:
    metrics = {"train/kid_64": 0.5, "train/kid_low_64": 0.25, "train/kid_high_64": 0.75, "low_loss": 2.0, "psnr": 30.0}
    gates = {"psnr": {"min": 20.0, "max": 40.0}, "train/kid_64": {"max": 1.0}}
    text = card(manifest("scores", {"observe": {"gates": gates}}, metrics))
    assert section(text, "## Metrics")[2:] == [
        "| `low_loss` | 2 |  |",
        "| `psnr` | 30 |  |",
        "| `train/kid_64` | 0.5 | 0.25 to 0.75 |",
    ]
    assert section(text, "## Gates")[2:] == [
        "| `psnr` | at least 20 and at most 40 | 30 | yes |",
        "| `train/kid_64` | at most 1 | 0.5 | yes |",
    ]


def test_numbers_of_single_pictures_have_the_interval_of_the_record(tmp_path: Path) -> None:
    """A gate's interval is the card's: what `scores.json` says."""
    number = {"value": 0.5, "low": 0.25, "high": 0.625, "pictures": 8}
    (tmp_path / "scores.json").write_text(
        json.dumps({"against": {}, "numbers": {"recall": number, "loss": {"value": 2}}})
    )
    scores = manifest("scores", metrics={"recall": 0.5, "loss": 2.0})
    there = scores.artifact.model_copy(update={"uri": str(tmp_path)})
    files = (FileEntry(path="scores.json", size=1, sha256=""),)
    text = card(scores.model_copy(update={"artifact": there, "files": files}))
    assert section(text, "## Metrics")[2:] == ["| `loss` | 2 |  |", "| `recall` | 0.5 | 0.25 to 0.625 |"]


def test_memorization_is_told_by_split_or_not_known() -> None:
    measured = {"train/memorized": 0.0125, "of_all/heldout/memorized": 0.0, "train/copied": 0.9}
    told = section(card(manifest("scores", metrics=measured)), "## Memorization")
    assert told[1:3] == [
        "- `train/memorized`: 1.25 % of the pictures",
        "- `of_all/heldout/memorized`: 0 % of the pictures",
    ]
    assert told[4:] == ["- `train/copied`: 90 % of the pictures"]
    assert "is not known" in section(card(), "## Memorization")[0]
    assert section(card(), "## Metrics") == ["No scores were given to this release."]


def test_speed_is_told_with_the_machine_that_drew() -> None:
    metrics = {"speed/pictures_per_second": 12.5, "speed/parameters": 3456.0, "samples_train": 7.0}
    drawn = manifest("samples", {"batch_size": 32}, metrics)
    drawn = drawn.model_copy(update={"environment": {"hardware": "an H100", "precision_used": "bf16"}})
    assert section(card(None, drawn), "## Speed") == [
        "an H100, products in bf16, 32 pictures at a time:",
        "| metric | value |",
        "| --- | --- |",
        "| `speed/pictures_per_second` | 12.5 |",
        "| `speed/parameters` | 3,456 |",
    ]
    assert section(card(None, manifest("samples")), "## Speed") == ["It was not measured."]


def test_what_people_said_and_what_nobody_said() -> None:
    text = card()
    assert section(text, "## Intended use") == ["To look at."] and section(text, "## License") == ["MIT"]
    assert section(text, "## Limits") == ["Nothing was stated."]
    assert "64 x 64 pixels of a text and a class label" in text and "sample([\"a prompt\"], labels=['red'])" in text
    assert "1. a | b" in section(text, "## Grid")


def test_data_are_counted_and_their_places_are_private() -> None:
    source = {
        "kind": "mix",
        "sources": [{"kind": "folder", "path": "/home/ada/pictures", "captions": {}}],
        "table": "https://ada:secret@example.org/list.csv?token=secret",
    }
    shards = manifest("shards", {"source": source, "filters": {"min_side": 32, "blocklist": ""}})
    text = data_card(SAID, known(shards))
    for row in ("| train samples | 1,234 |", "| `too_small` | 1,000 |", "| `blocked` | 2 |", "| mine | CC0 |"):
        assert row in text
    assert "| takedowns behind it | 1 |" in text and "| `min_side` | 32 |" in text and "blocklist" not in text
    assert "kind: folder, path: .../pictures" in text and "https://example.org/list.csv |" in text
    assert "ada" not in text and "secret" not in text


def test_weights_from_elsewhere_and_what_is_gone_are_named() -> None:
    begun = manifest("system", {"initial": {"weights": "/home/ada/clip.safetensors", "format": "openai"}})
    text = data_card(SAID, known(begun, gone=(Artifact(kind="shards", uri="x", fingerprint="a" * 64),)))
    assert "| system | `initial.weights` | .../clip.safetensors |" in text
    assert f"- shards `{'a' * 12}`" in section(text, "## Not there any more")
