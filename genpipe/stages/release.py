"""release: a system and its scores to one folder that draws by itself, says what it is, and can be verified.

A data stage of one part. The folder holds copies of the parts' weights (`parts/ROLE`), how they draw (`system.yaml`),
a grid, pictures of its samples on a page, a model card, a data card, what other libraries load (`diffusers/`), and the
sha256 of all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field

from genpipe.artifacts import Artifact, Manifest, ManifestError, Role, read_manifest, several
from genpipe.evaluation.drawn import Drawings
from genpipe.generation.released import copy_system
from genpipe.generation.systems import load_released
from genpipe.lineage import check_made_from, fingerprints_behind, manifests_behind
from genpipe.models.precision import Precision, products_of
from genpipe.release.cards import DATA_CARD, MODEL_CARD, Known, Statements, data_card, model_card
from genpipe.release.elsewhere import write_elsewhere
from genpipe.release.grid import check_grid_prompts, draw_grid, grid_prompts
from genpipe.release.record import GRID_FILE, Grid, machine_of, write_record
from genpipe.release.samples_page import about_system, write_samples_page
from genpipe.release.scores import check_scores
from genpipe.stage_config import Observe, StageConfig

VERSION = 2
MAKES = "release"
HEADLINES = ("files", "megabytes")


class ObserveRelease(Observe):
    """How a release is watched, and where it is registered."""

    register_as: str = Field("", description="name of the registered model in MLflow; none: the pipeline's experiment")


class Config(StageConfig):
    """What a release says of itself, what its grid shows, and what keeps it from being made."""

    title: str = Field("A genpipe system", min_length=1, description="of the cards")
    license: str = Field("", description="of the weights, as the model card names it")
    data_licenses: dict[str, str] = Field(default_factory=dict, description="of the training data, by source")
    intended_use: str = Field("", description="for the model card: what it is for, and what it is not for")
    limits: str = Field("", description="for the model card: what it cannot do")
    max_memorized: float = Field(
        0.05, ge=0, le=1, description="largest share of pictures that are nearly training pictures; 1: all may be"
    )
    prompts: tuple[str, ...] = Field((), description="rows of the grid; none: prompts of the samples, or classes")
    rows: int = Field(8, ge=1, description="of the grid, at most, unless prompts are named")
    each: int = Field(4, ge=1, description="pictures of a row")
    seed: int = Field(0, description="of the grid")
    precision: Precision = Field("fp32", description="of the grid's matrix products; fp32 is nearest elsewhere")
    samples: int = Field(64, ge=0, description="pictures of each split on samples.html; none where none are mapped")
    training_pictures: bool = Field(
        False, description="show the training pictures nearest to them, too, which are then part of the release"
    )
    diffusers: bool = Field(True, description="also write parts as diffusers and transformers load them, where they do")
    observe: ObserveRelease = ObserveRelease()


def roles(cfg: Config) -> dict[str, Role]:
    """The system, scores that say whether it may be released, and samples whose prompts the grid shows."""
    return {
        "system": Role("system"),
        "evaluate": Role("scores", optional=True, several=True),
        "sample": Role("samples", optional=True),
    }


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What the system promises. Raises ValueError where the grid lacks prompts, or has some that nobody reads."""
    system = inputs["system"]
    check_grid_prompts(system, cfg.prompts, sampled="sample" in inputs)
    kept = ("kind", "size", "conditioned_on", "classes", "clips")
    return {name: system.meta[name] for name in kept if name in system.meta}


def parts(cfg: Config, inputs: Mapping[str, Artifact]) -> list[str]:
    """One: the whole. Raises ValueError where the scores forbid it."""
    check_scores(_scores(inputs), system=inputs["system"], max_memorized=cfg.max_memorized)
    return ["release"]


class Worker:
    """Assembles the release, and draws its grid from what was assembled."""

    def __init__(self, cfg: Config, inputs: Mapping[str, Artifact]) -> None:
        self.cfg, self.inputs = cfg, inputs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, part: str, out: Path) -> dict[str, Any]:
        """Write every file of the release; how many there are, and how large they are together.

        Raises ValueError if a part was made from other content than the system was.
        """
        system = _manifest(self.inputs["system"])
        check_made_from({**system.inputs, "system": system.artifact})
        scores = _scores(self.inputs)
        known = Known(system, scores, *manifests_behind(system.artifact), samples=_measured(scores))
        copy_system(system.config["model"], system.inputs, out)
        elsewhere = write_elsewhere(out) if self.cfg.diffusers else {}
        grid = self._draw(out)
        said = self._statements()
        self._show_samples(known, out)
        card = model_card(said, known, grid=grid, machine=machine_of(self.device), elsewhere=elsewhere, folder=out)
        (out / MODEL_CARD).write_text(card, encoding="utf-8")
        (out / DATA_CARD).write_text(data_card(said, known), encoding="utf-8")
        made_from = fingerprints_behind(*self.inputs.values())
        write_record(out, system=system.artifact.fingerprint, made_from=made_from, grid=grid, device=self.device)
        sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
        return {"files": len(sizes), "bytes": sum(sizes)}

    def _draw(self, out: Path) -> Grid:
        """Draw the grid with the copies in `out`, so that nothing of it comes from anywhere else."""
        prompts = grid_prompts(self.inputs["system"], self.inputs.get("sample"), self.cfg.prompts, rows=self.cfg.rows)
        grid = Grid(
            prompts=tuple(prompts),
            each=self.cfg.each,
            seed=self.cfg.seed,
            precision=products_of(self.cfg.precision, self.device),
            threads=torch.get_num_threads(),
        )
        pictures = draw_grid(load_released(out, device=self.device), grid, device=self.device)
        Image.fromarray(pictures).save(out / GRID_FILE)
        return grid

    def _show_samples(self, known: Known, out: Path) -> None:
        """Write the page of what the system has drawn, if samples of its own are there."""
        samples = _manifest(self.inputs["sample"]) if "sample" in self.inputs and self.cfg.samples else None
        drawn_by = samples.inputs.get("system") if samples is not None else None
        if samples is None or drawn_by is None or drawn_by.fingerprint != known.system.artifact.fingerprint:
            return
        write_samples_page(
            out,
            Drawings.of_samples(samples, known.scores),
            most=self.cfg.samples,
            training=self.cfg.training_pictures,
            about=about_system(self.cfg.title, known.system, known.behind),
        )

    def _statements(self) -> Statements:
        cfg = self.cfg
        return Statements(cfg.title, cfg.license, cfg.intended_use, cfg.limits, cfg.data_licenses)


def finalize(
    cfg: Config, inputs: Mapping[str, Artifact], results: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """The system's meta; files and size are the metrics."""
    [made] = results
    return check_inputs(cfg, inputs), {"files": float(made["files"]), "megabytes": made["bytes"] / 1e6}


def _scores(inputs: Mapping[str, Artifact]) -> list[Manifest]:
    return [_manifest(artifact) for artifact in several(inputs, "evaluate")]


def _measured(scores: Sequence[Manifest]) -> list[Manifest]:
    """The samples that scores are of, each once, those that are there."""
    samples = {of.inputs["sample"].fingerprint: of.inputs["sample"].uri for of in scores if "sample" in of.inputs}
    found = (read_manifest(uri, check_files=False) for uri in samples.values())
    return [manifest for manifest in found if manifest is not None]


def _manifest(artifact: Artifact) -> Manifest:
    manifest = read_manifest(artifact.uri)
    if manifest is None:
        raise ManifestError(f"{artifact.uri}: is not committed (any more); make it again with `genpipe run`")
    return manifest
