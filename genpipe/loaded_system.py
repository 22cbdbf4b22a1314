"""A trained system in memory, as `genpipe.load` gives it: what it draws, and what it does with pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from genpipe.artifacts import Artifact
from genpipe.config import Tree, parse
from genpipe.data.image_batches import to_uint8
from genpipe.data.shards import NO_LABEL
from genpipe.data.text import clean_text
from genpipe.diffusion.process import SamplerConfig, check_sampler
from genpipe.generation.asking import asked_of, wanted_of
from genpipe.generation.conditions import Conditions
from genpipe.generation.drawing import draft as draw_draft
from genpipe.generation.drawing import enlarged
from genpipe.generation.image_to_image import redraw
from genpipe.generation.inpainting import inpaint
from genpipe.generation.interpolation import from_caption, interpolate
from genpipe.generation.outpainting import bordered, outpaint
from genpipe.generation.picking import Draw, pick
from genpipe.generation.pictures import Picture, read_hole, read_picture, square
from genpipe.generation.principal import basis_of, doubling, reconstruct
from genpipe.generation.prompts import Prompt
from genpipe.generation.representation import Representation, as_unclip, represent
from genpipe.generation.signals import SIGNALS, draw_signals
from genpipe.generation.systems import System, load_system
from genpipe.generation.systems.unclip import UnclipSystem
from genpipe.generation.text_diffs import THETAS, change
from genpipe.generation.typography import Attacked, captions_for, probabilities, write_on
from genpipe.generation.variations import vary
from genpipe.models.precision import Precision, autocast, products_of
from genpipe.training.stream import seeded

BATCH_SIZE = 16

OnPicture = Callable[[Image.Image], None]


class LoadedSystem:
    """A trained system in memory.

    `artifact` is what was loaded, `kind` which kind of system it is, `size` the side of its pictures in pixels,
    `conditioned_on` what it must be told of each picture (some of "text" and "label"), `classes` the names of its
    classes, if it is conditioned on labels, `sampler` how its decoder draws unless it is told otherwise.
    """

    def __init__(self, artifact: Artifact, *, device: torch.device, precision: Precision = "auto") -> None:
        """Read the parts of a committed system. Raises ValueError if they are damaged or not there."""
        self.artifact, self.device = artifact, device
        self._system = load_system(artifact, device=device)
        self._products = products_of(precision, device)
        self.size: int = self._system.size
        self.conditioned_on: frozenset[str] = self._system.conditioned_on
        self.classes: tuple[str, ...] = self._system.classes
        self.kind = str(artifact.meta["kind"])
        self.sampler: SamplerConfig = self._system.decoder_sampler

    def __repr__(self) -> str:
        told = " and ".join(sorted(self.conditioned_on)) or "nothing"
        return f"<system {self.artifact.uri}: {self.size} px, conditioned on {told}, on {self.device}>"

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str] = (),
        *,
        labels: Sequence[str | int] = (),
        negative: str = "",
        each: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = BATCH_SIZE,
        numbers: Sequence[int] | None = None,
        draft: bool = False,
        on_picture: OnPicture | None = None,
    ) -> list[Image.Image]:
        """Draw `each` pictures of every prompt, in the order of the prompts, as RGB images of `size` pixels.

        `labels` are classes, by name or number, for a system that is conditioned on them: one for each prompt, or alone
        if it takes no text. `negative` says what the pictures shall not show: guidance leads away from it. `steps` and
        `guidance_scale` replace those of the decoder's sampler (1 is no guidance). `batch_size` pictures are drawn at a
        time. The same prompts, seed and batch size give the same pictures on the same device. The `info` of each has
        its prompt, label, seed, number and the system's fingerprint, as texts; `on_picture` is called with each as soon
        as it is drawn.

        Of the pictures that the rest asks for, counted from 0, `numbers` are drawn alone, in the order of the numbers:
        those that are worth it of many that were seen, say as a `draft`, which is what the decoder makes, without the
        upsamplers. They are the same but for rounding (`generation.picking.pick`).

        Raises ValueError for what the system is not conditioned on, for what it must be told and is not, for settings
        that do not fit it, and for numbers of which there are no pictures.
        """
        system = self._drawing(steps, guidance_scale)
        return self._drawn(
            [prompt for prompt in self._asked(prompts, labels) for _ in range(each)],
            partial(draw_draft, system) if draft else system.sample,
            system,
            negative=negative,
            seed=seed,
            batch_size=batch_size,
            numbers=numbers,
            facts={"use": "draft"} if draft else None,
            on_picture=on_picture,
        )

    @torch.no_grad()
    def redraw(
        self,
        picture: Picture,
        prompt: str = "",
        *,
        strength: float = 0.6,
        label: str | int | None = None,
        negative: str = "",
        each: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Image.Image]:
        """Image to image: noise up to time `strength` in (0, 1] is added to a picture and taken away (SDEdit).

        Of any system, told of the pictures as for `sample`; `picture` is an image or a file. Raises ValueError.
        """
        system = self._drawing(steps, guidance_scale)
        image = square(read_picture(picture), size=system.base_size, device=self.device)

        def draw(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
            many = image.expand(conditions.count, -1, -1, -1)
            return enlarged(system, redraw(system, many, conditions, strength=strength, generator=generator), generator)

        facts = {"use": "redraw", "strength": f"{strength:g}"}
        asked = self._asked_one(prompt, label) * each
        return self._drawn(asked, draw, system, negative=negative, seed=seed, batch_size=batch_size, facts=facts)

    @torch.no_grad()
    def inpaint(
        self,
        picture: Picture,
        prompt: str = "",
        *,
        mask: Picture | None = None,
        label: str | int | None = None,
        negative: str = "",
        each: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Image.Image]:
        """Draw anew where `mask`, of the picture's size, is white, or without one where the picture is transparent.

        Of any system, told of the whole picture as for `sample` (RePaint). The rest of the picture, cut to its middle
        and scaled to `size`, is kept exactly. Raises ValueError.
        """
        system = self._drawing(steps, guidance_scale)
        image = square(read_picture(picture), size=self.size, device=self.device)
        keep = ~read_hole(picture, mask, size=self.size, device=self.device)

        def draw(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
            count = conditions.count
            many, kept = image.expand(count, -1, -1, -1), keep.expand(count, -1, -1, -1)
            return inpaint(system, many, kept, conditions, generator=generator)

        asked = self._asked_one(prompt, label) * each
        facts = {"use": "inpaint"}
        return self._drawn(asked, draw, system, negative=negative, seed=seed, batch_size=batch_size, facts=facts)

    @torch.no_grad()
    def outpaint(
        self,
        picture: Picture,
        prompt: str = "",
        *,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        label: str | int | None = None,
        negative: str = "",
        each: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image.Image]:
        """Draw more around a picture: so many pixels at each side, of a picture of `size` pixels.

        Of any system, told of what is to be seen in every window as for `sample`. The picture, cut to its middle and
        scaled to `size`, is kept exactly. Raises ValueError.
        """
        system = self._drawing(steps, guidance_scale)
        image = square(read_picture(picture), size=self.size, device=self.device)
        canvas, known = bordered(image, left=left, top=top, right=right, bottom=bottom)
        if known.all():
            raise ValueError("outpaint: say by how many pixels at left, top, right or bottom the picture is extended")

        def draw(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
            def fill(images: Tensor, keep: Tensor) -> Tensor:
                return inpaint(system, images, keep, conditions, generator=generator)

            return outpaint(canvas, known, size=self.size, fill=fill)

        asked = self._asked_one(prompt, label) * each
        facts = {"use": "outpaint"}
        return self._drawn(asked, draw, system, negative=negative, seed=seed, batch_size=1, facts=facts)

    @torch.no_grad()
    def vary(
        self,
        picture: Picture,
        *,
        eta: float = 1.0,
        each: int = 4,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Image.Image]:
        """Variations: what CLIP sees of a picture stays, the rest is drawn anew (unCLIP, section 3.1).

        Of systems of kind unclip. `eta` in [0, 1] is how much is new: at 0 the picture itself comes back. Raises
        ValueError.
        """
        system = as_unclip(self._drawing(steps, guidance_scale), use="variations")
        represented = self._represented(system, picture)

        def draw(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
            sampler = system.decoder_sampler
            images = vary(system, represented, each=conditions.count, eta=eta, sampler=sampler, generator=generator)
            return enlarged(system, images, generator)

        facts = {"use": "vary", "eta": f"{eta:g}"}
        return self._drawn([Prompt("")] * each, draw, system, seed=seed, batch_size=batch_size, facts=facts)

    @torch.no_grad()
    def blend(
        self,
        first: Picture,
        second: Picture,
        *,
        count: int = 5,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image.Image]:
        """`count` pictures from one to another, both included (unCLIP, section 3.2).

        Of systems of kind unclip. Each end is an image or a `Path` of one, or a text: a caption for which the prior
        draws the embedding. Raises ValueError.
        """
        system = as_unclip(self._drawing(steps, guidance_scale), use="interpolation")

        def draw(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
            ends = [
                from_caption(system, clean_text(end), generator=generator)
                if isinstance(end, str)
                else self._represented(system, end)
                for end in (first, second)
            ]
            images = interpolate(system, *ends, count=count, sampler=system.decoder_sampler)
            return enlarged(system, images, generator)

        facts = {"use": "blend"}
        return self._drawn([Prompt("")] * count, draw, system, seed=seed, batch_size=count, facts=facts)

    @torch.no_grad()
    def change(
        self,
        picture: Picture,
        after: str,
        *,
        before: str = "",
        thetas: Sequence[float] = THETAS,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image.Image]:
        """A picture changed by the difference of two captions, a picture for each theta (unCLIP, section 3.3).

        Of systems of kind unclip. `before` says what the picture shows and `after` what it is to show; of `thetas` 0 is
        the picture and 1 the difference alone. Raises ValueError.
        """
        system = as_unclip(self._drawing(steps, guidance_scale), use="text diffs")
        represented, captions = self._represented(system, picture), [clean_text(before), clean_text(after)]

        def draw(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
            sampler = system.decoder_sampler
            images = change(system, represented, before=captions[0], after=captions[1], thetas=thetas, sampler=sampler)
            return enlarged(system, images, generator)

        facts = {"use": "change", "before": before, "after": after}
        return self._drawn([Prompt("")] * len(thetas), draw, system, seed=seed, batch_size=len(thetas), facts=facts)

    @torch.no_grad()
    def reconstruct(
        self,
        picture: Picture,
        *,
        components: Sequence[int] | None = None,
        pictures: Sequence[Picture] = (),
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image.Image]:
        """What CLIP sees of a picture, with its first principal components, a picture for each count (unCLIP, fig. 7).

        Of systems of kind unclip. The components are those of `pictures`, or without any those that an autoregressive
        prior was fitted with; by default 1, 2, 4, ... and all of them are kept. Raises ValueError.
        """
        system = as_unclip(self._drawing(steps, guidance_scale), use="principal components")
        basis = basis_of(system, [self._embedded(system, each) for each in pictures] if pictures else None)
        embed = self._embedded(system, picture)
        counts = doubling(len(basis[1])) if components is None else components

        def draw(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
            sampler = system.decoder_sampler
            images = reconstruct(system, embed, basis, counts=counts, sampler=sampler, generator=generator)
            return enlarged(system, images, generator)

        facts, count = {"use": "reconstruct"}, len(counts)
        return self._drawn([Prompt("")] * count, draw, system, seed=seed, batch_size=count, facts=facts)

    @torch.no_grad()
    def attack(
        self,
        picture: Picture,
        labels: Sequence[str],
        *,
        caption: str = "{}",
        each: int = 4,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Attacked]:
        """A picture as it is, and with each label but the first written on it (unCLIP, figure 6).

        Of systems of kind unclip. The first of `labels` says what the picture shows. The system's CLIP chooses among
        all of them, each put into `caption` at its {}; the decoder varies each picture `each` times. Raises ValueError.
        """
        system = as_unclip(self._drawing(steps, guidance_scale), use="typographic attacks")
        text = system.encode_text(captions_for(labels, caption))
        pixels = to_uint8(square(read_picture(picture), size=self.size, device=self.device))[0]
        shown = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        found = []
        for words in ("", *labels[1:]):
            attacked = write_on(shown, words) if words else shown
            shares = probabilities(system, self._embedded(system, attacked), text.embed)[0].tolist()
            varied = self.vary(attacked, each=each, seed=seed, steps=steps, guidance_scale=guidance_scale)
            found.append(Attacked(words, attacked, dict(zip(labels, shares, strict=True)), varied))
        return found

    @torch.no_grad()
    def signals(
        self, prompts: Sequence[str], *, seed: int = 0, steps: int | None = None, guidance_scale: float | None = None
    ) -> list[list[Image.Image]]:
        """Pictures of each prompt from each of SIGNALS: what of a caption the decoder is told (unCLIP, figure 8).

        Of systems of kind unclip. A list for each prompt. Raises ValueError.
        """
        system = as_unclip(self._drawing(steps, guidance_scale), use="conditioning signals")
        asked = self._asked(prompts, ())

        def draw(conditions: Conditions, *, generator: torch.Generator) -> Tensor:
            assert conditions.texts is not None, "unCLIP is conditioned on text"
            images = torch.stack(draw_signals(system, conditions.texts[:: len(SIGNALS)], generator=generator), dim=1)
            return enlarged(system, images.flatten(0, 1), generator)

        many = [prompt for prompt in asked for _ in SIGNALS]
        drawn = self._drawn(many, draw, system, seed=seed, batch_size=len(many))
        return [drawn[i : i + len(SIGNALS)] for i in range(0, len(drawn), len(SIGNALS))]

    def _drawn(
        self,
        asked: Sequence[Prompt],
        draw: Draw,
        system: System,
        *,
        seed: int,
        batch_size: int,
        negative: str = "",
        numbers: Sequence[int] | None = None,
        facts: Mapping[str, str] | None = None,
        on_picture: OnPicture | None = None,
    ) -> list[Image.Image]:
        """The pictures that `draw` makes of what is asked, batch by batch, or those with `numbers`. Raises ValueError.

        A batch is drawn as it is, or of some of its pictures as `pick` draws them.
        """
        if min(len(asked), batch_size) < 1:
            raise ValueError(f"each and batch_size are 1 or more, not {len(asked)} and {batch_size}")
        self._check_negative(negative, system)
        wanted = wanted_of(numbers, of=len(asked))
        pictures: list[Image.Image] = []
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            rows = [row for row in range(len(batch)) if first + row in wanted]
            if not rows:
                continue
            conditions, generator = self._conditions(batch, negative), seeded(self.device, seed, first)
            with autocast(self.device, self._products):
                if len(rows) == len(batch):
                    images = draw(conditions, generator=generator)
                else:
                    images = pick(draw, conditions, rows, generator=generator)
            for row, array in zip(rows, to_uint8(images).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                picture = Image.fromarray(array)
                told = {**(facts or {}), "negative": negative}
                picture.info = self._info(batch[row], seed=seed, number=first + row, facts=told)
                pictures.append(picture)
                if on_picture is not None:
                    on_picture(picture)
        return pictures

    def _represented(self, system: UnclipSystem, picture: Picture) -> Representation:
        """A picture as unCLIP represents it."""
        image = square(read_picture(picture), size=system.base_size, device=self.device)
        with autocast(self.device, self._products):
            return represent(system, image, self._embedded(system, picture), sampler=system.decoder_sampler)

    def _embedded(self, system: UnclipSystem, picture: Picture) -> Tensor:
        """CLIP's embedding of a picture, a unit vector [1, D]."""
        image = square(read_picture(picture), size=system.clip.cfg.image_size, device=self.device)
        with autocast(self.device, self._products):
            return system.embed(image)

    def _check_negative(self, negative: str, system: System) -> None:
        """Raise ValueError for a negative prompt that would have no effect."""
        if not negative:
            return
        if "text" not in self.conditioned_on:
            raise ValueError("negative: the system is not conditioned on text, so leave it out")
        if system.decoder_sampler.guidance_scale == 1.0:
            raise ValueError("negative: has no effect without guidance; give a guidance_scale above 1, or leave it out")
        clean_text(negative)  # refuses what is too long

    def _asked_one(self, prompt: str, label: str | int | None) -> list[Prompt]:
        return self._asked([prompt] if prompt else [], [] if label is None else [label])

    def _asked(self, prompts: str | Sequence[str], labels: Sequence[str | int]) -> list[Prompt]:
        return asked_of(prompts, labels, conditioned_on=self.conditioned_on, classes=self.classes)

    def _conditions(self, batch: Sequence[Prompt], negative: str) -> Conditions:
        texts = [prompt.text for prompt in batch] if "text" in self.conditioned_on else None
        labels = [prompt.label for prompt in batch] if "label" in self.conditioned_on else None
        return Conditions(
            len(batch), texts=texts, labels=labels, negative=[negative] * len(batch) if negative else None
        )

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

    def _info(
        self, prompt: Prompt, *, seed: int, number: int, facts: Mapping[str, str]
    ) -> dict[str | tuple[int, int], str]:
        """What is known of a picture."""
        label = self.classes[prompt.label] if prompt.label != NO_LABEL else ""
        known = {"prompt": prompt.text, "label": label, **facts, "seed": str(seed), "number": str(number)}
        known["system"] = self.artifact.fingerprint
        return {name: text for name, text in known.items() if text}
