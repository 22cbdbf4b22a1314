"""genpipe from Python: what `genpipe.load`, `genpipe.plan` and `genpipe.run` are.

system = genpipe.load("runs/demo")
pictures = system.sample(["a red apple, drawn in twemoji style"], seed=0)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from genpipe.artifacts import Artifact
from genpipe.config import ConfigError, Tree, parse
from genpipe.data.image_batches import to_uint8
from genpipe.data.shards import NO_LABEL
from genpipe.data.text import clean_text, is_visible
from genpipe.diffusion.process import SamplerConfig, check_sampler
from genpipe.generation.conditions import Conditions
from genpipe.generation.prompts import Prompt
from genpipe.generation.systems import System, load_system
from genpipe.models.precision import Precision, autocast, products_of
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import Planned
from genpipe.pipeline.plan import plan as plan_pipeline
from genpipe.pipeline.systems import find_system
from genpipe.tracking.registry import resolve
from genpipe.training.stream import seeded

if TYPE_CHECKING:
    from flows.reporting import Reporter, StageResult

BATCH_SIZE = 16


def load(
    source: str | Path,
    *,
    system: str = "",
    tracking_uri: str = "",
    device: str | torch.device | None = None,
    precision: Precision = "auto",
) -> LoadedSystem:
    """A trained system, in memory and ready to draw. The training data are not needed.

    `source` is a store with one trained system (`runs/demo`), the URI of a system's artifact, a pipeline's YAML file
    whose system is made (`system` names it where there are several), or a registered model (`models:/NAME@ALIAS`, of
    the MLflow at `tracking_uri`; default: the environment variable MLFLOW_TRACKING_URI). `device` is by default the
    GPU, if there is one; `precision` is that of matrix products.

    Raises ValueError where there is no such system, more than one, or one whose files are damaged.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedSystem(_artifact(str(source), system, tracking_uri), device=where, precision=precision)


def plan(config: str | Path, overrides: Sequence[str] = (), *, sources: bool = True) -> list[Planned]:
    """What a run of a pipeline would do: the `name`, `status` (cached or run), `why` and `artifact` of each stage.

    `overrides` are settings that replace the file's: `["stages.decoder.train.samples=1000"]`. Without `sources` the
    data are not looked at, and nothing that depends on them counts as done. Raises ConfigError, a ValueError, for
    anything that is wrong with the pipeline, and ManifestError, another, where what is committed is damaged.
    """
    pipeline = load_pipeline(str(config), overrides)
    return plan_pipeline(pipeline, sources=sources, resolve=partial(resolve, tracking_uri=pipeline.tracking_uri))


def run(config: str | Path, overrides: Sequence[str] = (), *, reporter: Reporter | None = None) -> list[StageResult]:
    """Run a pipeline: every stage that is not done yet. The result of each stage, those that failed among them.

    A result has its `stage`, `status` (cached, ran, failed or skipped), `artifact`, `metrics`, and in `message` why it
    failed. `reporter` is told of all progress, by default in lines on standard output. Raises ValueError before any
    work if the configuration is wrong or a service cannot be reached.
    """
    from flows.pipeline import run_pipeline

    return run_pipeline(str(config), overrides, reporter=reporter)


class LoadedSystem:
    """A trained system in memory.

    `artifact` is what was loaded, `size` the side of its pictures in pixels, `conditioned_on` what it must be told of
    each picture (some of "text" and "label"), `classes` the names of its classes, if it is conditioned on labels.
    """

    def __init__(self, artifact: Artifact, *, device: torch.device, precision: Precision = "auto") -> None:
        """Read the parts of a committed system. Raises ValueError if they are damaged or not there."""
        self.artifact, self.device = artifact, device
        self._system = load_system(artifact, device=device)
        self._products = products_of(precision, device)
        self.size: int = self._system.size
        self.conditioned_on: frozenset[str] = self._system.conditioned_on
        self.classes: tuple[str, ...] = self._system.classes

    def __repr__(self) -> str:
        told = " and ".join(sorted(self.conditioned_on)) or "nothing"
        return f"<system {self.artifact.uri}: {self.size} px, conditioned on {told}, on {self.device}>"

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str] = (),
        *,
        labels: Sequence[str | int] = (),
        each: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = BATCH_SIZE,
        on_picture: Callable[[Image.Image], None] | None = None,
    ) -> list[Image.Image]:
        """Draw `each` pictures of every prompt, in the order of the prompts, as RGB images of `size` pixels.

        `labels` are classes, by name or number, for a system that is conditioned on them: one for each prompt, or alone
        if it takes no text. `steps` and `guidance_scale` replace those of the decoder's sampler (1 is no guidance).
        `batch_size` pictures are drawn at a time. The same prompts, seed and batch size give the same pictures on the
        same device. The `info` of each has its prompt, label, seed, number and the system's fingerprint, as texts;
        `on_picture` is called with each as soon as it is drawn.

        Raises ValueError for what the system is not conditioned on, for what it must be told and is not, and for
        settings that do not fit it.
        """
        asked = [prompt for prompt in self._asked(prompts, labels) for _ in range(each)]
        if min(each, batch_size) < 1:
            raise ValueError(f"each and batch_size are 1 or more, not {each} and {batch_size}")
        system = self._drawing(steps, guidance_scale)
        pictures: list[Image.Image] = []
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            generator = seeded(self.device, seed, first)
            with autocast(self.device, self._products):
                images = system.sample(self._conditions(batch), generator=generator)
            for prompt, array in zip(batch, to_uint8(images).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                picture = Image.fromarray(array)
                picture.info = self._info(prompt, seed=seed, number=len(pictures))
                pictures.append(picture)
                if on_picture is not None:
                    on_picture(picture)
        return pictures

    def _asked(self, prompts: str | Sequence[str], labels: Sequence[str | int]) -> list[Prompt]:
        """What is to be drawn. Raises ValueError for what the system is not told, and for what it does not take."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        given = {"text": ("prompts", len(texts)), "label": ("labels", len(labels))}
        for condition, (argument, count) in given.items():
            if count and condition not in self.conditioned_on:
                known = " and ".join(sorted(self.conditioned_on)) or "nothing"
                raise ValueError(f"{argument}: the system is conditioned on {known}; leave them out")
            if not count and condition in self.conditioned_on:
                raise ValueError(f"{argument}: required, as the system is conditioned on {condition}; say what to draw")
        if texts and labels and len(texts) != len(labels):
            raise ValueError(f"labels: the system takes one for each prompt, not {len(labels)} for {len(texts)}")
        for place, text in enumerate(texts):
            if not is_visible(text):
                raise ValueError(f"prompts[{place}]: is empty; say what to draw")
            clean_text(text)  # refuses what is too long
        numbers = [self._class(label) for label in labels] or [NO_LABEL] * len(texts)
        return [Prompt(*one) for one in zip(texts or [""] * len(numbers), numbers, strict=True)] or [Prompt("")]

    def _class(self, label: str | int) -> int:
        """The place of a class, given by name or place. Raises ValueError."""
        if label in self.classes:
            return self.classes.index(str(label))
        if str(label).isdecimal() and int(label) < len(self.classes):
            return int(label)
        few = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        raise ValueError(f"labels: {label!r} is none of the system's classes; it has {few}, numbered from 0")

    def _conditions(self, batch: Sequence[Prompt]) -> Conditions:
        texts = [prompt.text for prompt in batch] if "text" in self.conditioned_on else None
        labels = [prompt.label for prompt in batch] if "label" in self.conditioned_on else None
        return Conditions(len(batch), texts=texts, labels=labels)

    def _drawing(self, steps: int | None, guidance_scale: float | None) -> System:
        """The system with another sampler of its decoder. Raises ValueError for one that does not fit."""
        if guidance_scale not in (None, 1) and not self.conditioned_on:
            raise ValueError("guidance_scale: the system is conditioned on nothing that could guide it; leave it out")
        wanted = {"steps": steps, "guidance_scale": guidance_scale}
        changes = {name: value for name, value in wanted.items() if value is not None}
        drawing = copy.copy(self._system)
        settings = {**self._system.decoder_sampler.model_dump(), **changes}
        drawing.decoder_sampler = parse(SamplerConfig, Tree(settings, source="sample"))
        try:
            check_sampler(drawing.decoder_sampler, drawing.decoder_diffusion)
        except ValueError as error:
            raise ValueError(f"steps: {error}") from error
        return drawing

    def _info(self, prompt: Prompt, *, seed: int, number: int) -> dict[str | tuple[int, int], str]:
        """What is known of a picture."""
        label = self.classes[prompt.label] if prompt.label != NO_LABEL else ""
        known = {"prompt": prompt.text, "label": label, "seed": str(seed), "number": str(number)}
        known["system"] = self.artifact.fingerprint
        return {name: text for name, text in known.items() if text}


def _artifact(source: str, system: str, tracking_uri: str) -> Artifact:
    """The committed system that `load` is asked for."""
    if not source.startswith("models:"):
        return find_system(source, name=system)
    where = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not where:
        raise ConfigError(f"{source}: in which MLflow? Set tracking_uri, or MLFLOW_TRACKING_URI in the environment")
    artifact = resolve(source, tracking_uri=where)
    if artifact.kind != "system":
        raise ConfigError(f"{source}: stands for an artifact of kind {artifact.kind}, not for a system")
    return artifact
