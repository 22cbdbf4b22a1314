"""The figures of README.md and docs/concepts.md: `python docs/site/figures.py` writes them to docs/figures/.

A figure is boxes and arrows, on a light ground of its own that is legible on dark pages, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "figures"

FONT = "font-family='system-ui, sans-serif'"
INK, GROUND, FAINT = "#263238", "#fafafa", "#607d8b"
FILLS = {
    "plain": "#ffffff",
    "data": "#fff3e0",
    "train": "#e3f2fd",
    "made": "#e8f5e9",
    "out": "#eceff1",
    "paper": GROUND,
}
LINE = 17
"""Height of a line of text, in pixels."""

Place = tuple[float, float]


@dataclass
class Figure:
    """Shapes on a ground of `width` x `height` pixels, drawn in the order in which they are added."""

    width: int
    height: int
    about: str
    shapes: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, text: str, *, fill: str = "plain", width: float = 120, height: float = 40) -> Box:
        """A box with its upper left corner at (x, y); of several lines of `text` the first is a title."""
        self.shapes.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{FILLS[fill]}' stroke='{FAINT}'/>"
        )
        lines = text.split("\n")
        top = y + height / 2 - LINE * (len(lines) - 1) / 2 + 4.5
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + i * LINE, line, bold=i == 0, anchor="middle")
        return Box(x, y, width, height)

    def text(
        self, x: float, y: float, text: str, *, bold: bool = False, anchor: str = "start", faint: bool = False
    ) -> None:
        """A line of text whose baseline is at y; faint text keeps clear of what is below it."""
        weight = " font-weight='600'" if bold else ""
        color = f"fill='{FAINT}' stroke='{GROUND}' stroke-width='9' paint-order='stroke'" if faint else f"fill='{INK}'"
        self.shapes.append(f"<text x='{x}' y='{y}' text-anchor='{anchor}' {color}{weight}>{escape(text)}</text>")

    def arrow(self, start: Place, end: Place, label: str = "") -> None:
        """A line with its head at `end`, and a label on its middle."""
        (x1, y1), (x2, y2) = start, end
        self.shapes.append(
            f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{INK}' stroke-width='1.3' marker-end='url(#head)'/>"
        )
        if label:
            self.text((x1 + x2) / 2, (y1 + y2) / 2 + 4.5, label, anchor="middle", faint=True)

    def svg(self) -> str:
        """The figure as a file's text."""
        head = (
            "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
            f"orient='auto'><path d='M0,0 L8,4 L0,8 z' fill='{INK}'/></marker></defs>"
        )
        size = f"width='{self.width}' height='{self.height}' viewBox='0 0 {self.width} {self.height}'"
        ground = f"<rect width='{self.width}' height='{self.height}' rx='10' fill='{GROUND}'/>"
        body = "\n".join([f"<title>{escape(self.about)}</title>", head, ground, *self.shapes])
        return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT} font-size='13'>\n{body}\n</svg>\n"


@dataclass(frozen=True)
class Box:
    """Where a box is, and where arrows meet it."""

    x: float
    y: float
    width: float
    height: float

    def left(self, share: float = 0.5) -> Place:
        """On its left side, `share` of the way down."""
        return self.x - 2, self.y + self.height * share

    def right(self, share: float = 0.5) -> Place:
        """On its right side, `share` of the way down."""
        return self.x + self.width + 1, self.y + self.height * share

    def top(self, share: float = 0.5) -> Place:
        """On its upper side, `share` of the way to the right."""
        return self.x + self.width * share, self.y - 2

    def bottom(self, share: float = 0.5) -> Place:
        """On its lower side, `share` of the way to the right."""
        return self.x + self.width * share, self.y + self.height + 1


def pipeline() -> Figure:
    """The demo's graph."""
    f = Figure(1000, 250, "The demo's pipeline: from images and captions to scores")
    images = f.box(15, 105, "images\n+ captions", fill="plain", width=90, height=46)
    shard = f.box(140, 108, "shard", fill="data", width=80)
    autoencoder = f.box(260, 28, "autoencoder", fill="train", width=105)
    clip = f.box(260, 108, "clip", fill="train", width=105)
    upsampler = f.box(260, 188, "upsampler", fill="train", width=105)
    features = f.box(405, 68, "features", fill="data", width=90)
    prior = f.box(535, 28, "prior", fill="train", width=90)
    decoder = f.box(535, 108, "decoder", fill="train", width=90)
    system = f.box(670, 108, "system", fill="made", width=90)
    sample = f.box(790, 108, "sample", fill="data", width=80)
    evaluate = f.box(900, 108, "evaluate", fill="data", width=85)
    for start, end in (
        (images.right(), shard.left()),
        (shard.right(0.3), autoencoder.left()),
        (shard.right(), clip.left()),
        (shard.right(0.7), upsampler.left()),
        (autoencoder.right(), features.left(0.35)),
        (clip.right(), features.left(0.65)),
        (features.right(0.35), prior.left()),
        (features.right(0.65), decoder.left()),
        (prior.right(), system.left(0.25)),
        (decoder.right(), system.left()),
        (upsampler.right(), system.bottom()),
        (system.right(), sample.left()),
        (sample.right(), evaluate.left()),
    ):
        f.arrow(start, end)
    return f


def instance() -> Figure:
    """An instance in a pipeline's file, and its place in the graph."""
    f = Figure(720, 200, "An instance: a block of the YAML, and what it stands for")
    for i, line in enumerate(
        ("stages:", "  features:", "    inputs: {clip: my_clip}", "    batch_size: 64", "  my_clip:", "    kind: clip")
    ):
        f.text(24, 42 + 22 * i, line.replace("  ", "\u00a0\u00a0\u00a0"))
    shard = f.box(270, 22, "shard", fill="data", width=110)
    autoencoder = f.box(270, 80, "autoencoder", fill="train", width=110)
    clip = f.box(270, 138, "my_clip\nkind: clip", fill="train", width=110)
    features = f.box(560, 68, "features\nbatch_size: 64", fill="data", width=130, height=64)
    f.arrow(shard.right(), features.left(0.2), "shard, by its name")
    f.arrow(autoencoder.right(), features.left(), "autoencoder, too")
    f.arrow(clip.right(), features.left(0.8), "clip, as mapped")
    return f


def artifact() -> Figure:
    """The folder of an artifact."""
    f = Figure(720, 200, "An artifact: files first, the manifest last")
    f.box(20, 25, "", fill="paper", width=340, height=150)
    f.text(36, 50, "STORE/artifacts/decoder/7866db88bb4db460/", faint=True)
    f.text(52, 80, "weights.safetensors")
    f.text(52, 103, "model.json")
    f.text(52, 143, "manifest.json", bold=True)
    f.text(160, 143, "written last", faint=True)
    manifest = f.box(420, 25, "", fill="made", width=290, height=150)
    for i, line in enumerate(
        ("files, each with size and sha256", "identity, and so the fingerprint", "settings, inputs, metrics",
         "meta: what a consumer must agree with", "a digest of all this")
    ):  # fmt: skip
        f.text(436, 54 + 25 * i, line)
    f.arrow((250, 139), manifest.left(0.76))
    return f


def fingerprint() -> Figure:
    """What goes into a fingerprint, and what does not."""
    f = Figure(720, 232, "A fingerprint: a hash of what decides the result")
    parts = (
        ("kind of the stage and its VERSION", "train"),
        ("settings that differ from the defaults", "train"),
        ("fingerprints of the inputs, by role", "made"),
        ("digest of what is read from outside", "data"),
    )
    inside = [f.box(20, 16 + 40 * i, text, fill=fill, width=310, height=32) for i, (text, fill) in enumerate(parts)]
    outside = f.box(20, 184, "resources, observe, names, places", fill="out", width=310, height=32)
    digest = f.box(430, 68, "sha256", width=90, height=40)
    name = f.box(580, 68, "7866db88...", fill="made", width=120)
    for i, box in enumerate(inside):
        f.arrow(box.right(), digest.left(0.2 + 0.2 * i))
    f.arrow(digest.right(), name.left())
    f.text(outside.right()[0] + 14, 205, "left out: they do not change what is made", faint=True)
    return f


def stage() -> Figure:
    """The two sorts of stage."""
    f = Figure(720, 245, "A training stage and a data stage")
    f.text(20, 34, "Training stage", bold=True)
    data = f.box(20, 48, "data", fill="data", width=110)
    objective = f.box(20, 102, "objective", fill="train", width=110)
    loop = f.box(200, 75, "one loop\nfor all", width=110, height=46)
    export = f.box(380, 78, "export", fill="train", width=110)
    made = f.box(560, 78, "weights", fill="made", width=130)
    f.arrow(data.right(), loop.left(0.3))
    f.arrow(objective.right(), loop.left(0.7))
    f.arrow(loop.right(), export.left())
    f.arrow(export.right(), made.left())
    f.text(20, 178, "Data stage", bold=True)
    parts = f.box(20, 192, "parts", fill="data", width=110, height=34)
    worker = f.box(195, 192, "Worker, on each", fill="data", width=125, height=34)
    finalize = f.box(380, 192, "finalize", fill="data", width=110, height=34)
    files = f.box(560, 192, "files", fill="made", width=130, height=34)
    for start, end in ((parts, worker), (worker, finalize), (finalize, files)):
        f.arrow(start.right(), end.left())
    return f


def system() -> Figure:
    """unCLIP's parts when it draws."""
    f = Figure(760, 176, "A system of kind unclip: from a prompt to a picture")
    boxes = [
        f.box(20, 40, "prompt", width=80),
        f.box(136, 40, "clip", fill="train", width=80),
        f.box(252, 40, "prior", fill="train", width=80),
        f.box(368, 40, "decoder", fill="train", width=90),
        f.box(494, 40, "autoencoder", fill="train", width=110),
        f.box(640, 40, "upsamplers", fill="train", width=100),
    ]
    for start, end in pairwise(boxes):
        f.arrow(start.right(), end.left())
    picture = f.box(640, 118, "picture", fill="made", width=100)
    f.arrow(boxes[-1].bottom(), picture.top())
    for box, text in zip(boxes[1:], ("text encodings", "image embed", "latents", "pixels"), strict=False):
        f.text(box.x + box.width / 2, 100, text, anchor="middle", faint=True)
    f.text(20, 142, "Under each part is what it gives to the next. The system adds the samplers.", faint=True)
    return f


def runtime() -> Figure:
    """What stands on either side of the runtime."""
    f = Figure(720, 190, "The runtime: one seam between the loop and whatever launched it")
    launchers = [
        f.box(20, 20 + 54 * i, text, width=150) for i, text in enumerate(("Ray Train", "torchrun", "this process"))
    ]
    seam = f.box(
        270,
        30,
        "Runtime\nrank, world_size, device\ncheckpoints, log\nshould_stop, enter",
        fill="made",
        width=190,
        height=130,
    )
    loop = f.box(560, 72, "training loop", fill="train", width=140, height=46)
    for launcher, share in zip(launchers, (0.2, 0.5, 0.8), strict=True):
        f.arrow(launcher.right(), seam.left(share))
    f.arrow(loop.left(), seam.right())
    return f


FIGURES = (pipeline, instance, artifact, fingerprint, stage, system, runtime)


def main() -> None:
    """Write all figures."""
    FOLDER.mkdir(exist_ok=True)
    for draw in FIGURES:
        (FOLDER / f"{draw.__name__}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
