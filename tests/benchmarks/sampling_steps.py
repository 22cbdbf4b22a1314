"""How good a system's pictures are after how many steps, by sampler.

    python tests/benchmarks/sampling_steps.py [--config configs/pipeline/demo.yaml] [--store runs/demo] [--part decoder]

The pipeline's stages must be made (`make demo`); what is drawn and measured beside them goes to the same store. For
each sampler and number of steps of one part of the system, the others as configured, it draws the same captions with
the same seeds. Cost is the number of evaluations of the network: heun takes two a step, the others one.

`--by clip` draws training captions and prints the Frechet distance to their real pictures in the judge's embeddings
(times 1,000) and how many pictures have their own caption among the ten nearest. `--by composition`, for
configs/pipeline/shapes.yaml, prints the share of pictures that show what was asked for, of training captions and of
held-out ones, as many of each. `--by frechet`, for a system without conditions (`--config` of memorizing.py),
prints the Frechet distance of as many pictures to all training pictures in the embeddings of the CLIP `--judge`, times
1,000. `--by convergence` asks for no network that judges: it prints how far the pictures are
from those that 200 steps of heun, of second order, draw from the same noise: root mean squares over a picture in levels
of 255, the median picture's and one that nine of ten are nearer than. It says nothing of what adds noise as it goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from judging import made

from genpipe.artifacts import Artifact, read_manifest
from genpipe.data.shard_dataset import open_splits

METRICS = {
    "clip": "{retrieval: {recall_at: [10]}, frechet: {network: {kind: clip}}}",
    "composition": "{composition: {}}",
    "frechet": "{frechet: {network: {kind: clip}, against: train}}",
}
REFERENCE = ("heun", 400)
"""What is taken for the exact solution, and its evaluations."""

SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim": {"kind": "ddim"},
    "heun": {"kind": "heun"},
    "dpmpp_2m": {"kind": "dpmpp_2m"},
    "dpmpp_2m, lower_order_final": {"kind": "dpmpp_2m", "lower_order_final": True},
    "dpmpp_2m, logsnr": {"kind": "dpmpp_2m", "timesteps": "logsnr"},
    "unipc": {"kind": "unipc"},
    "unipc, lower_order_final": {"kind": "unipc", "lower_order_final": True},
    "euler_ancestral": {"kind": "euler_ancestral"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pipeline/demo.yaml")
    parser.add_argument("--store", default="runs/demo")
    parser.add_argument("--part", default="decoder", choices=["decoder", "prior"])
    parser.add_argument("--evaluations", type=int, nargs="+", default=[4, 6, 8, 12, 16, 24, 48])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument("--by", default="clip", choices=[*METRICS, "convergence"])
    parser.add_argument("--judge", help="of --by frechet: a CLIP's artifact, of any store")
    options = parser.parse_args()
    tell = converging(options) if options.by == "convergence" else judged(options)
    print(
        f"\n| {options.part} | {' | '.join(map(str, options.evaluations))} |\n|---|{'---|' * len(options.evaluations)}"
    )
    for name in options.samplers:
        cells = [tell(name, evaluations) for evaluations in options.evaluations]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def settings(options: argparse.Namespace, name: str, evaluations: int) -> list[str]:
    """Of a pipeline that draws with a sampler and so many evaluations of the network."""
    steps = evaluations // 2 if name == "heun" else evaluations
    of_sampler = {**SAMPLERS[name], "steps": steps}
    drawn = [f"stages.system.model.{options.part}.{key}={value}" for key, value in of_sampler.items()]
    return [f"store={options.store}", "tracking.uri=jsonl", *drawn]


def judged(options: argparse.Namespace) -> Callable[[str, int], str]:
    """The numbers that the pipeline's metrics give a sampler after so many evaluations."""
    count = options.captions
    prompts = {
        "clip": f"{{kind: captions, train: {count}, heldout: 0}}",
        "composition": f"{{kind: captions, train: {count}, heldout: {count}}}",
        "frechet": f"{{kind: none, count: {count}}}",
    }
    fixed = [
        f"stages.sample.prompts={prompts[options.by]}",
        f"stages.evaluate.metrics={METRICS[options.by]}",
        "stages.evaluate.observe.gates={}",
    ]
    if options.judge:
        fixed.append(f"stages.evaluate.inputs.judge={options.judge}")
    return lambda name, evaluations: told(made(options.config, [*settings(options, name, evaluations), *fixed]))


def converging(options: argparse.Namespace) -> Callable[[str, int], str]:
    """How far a sampler's pictures are from the exact ones after so many evaluations."""

    def pictures(name: str, evaluations: int) -> np.ndarray:
        samples = made(options.config, settings(options, name, evaluations), stage="sample")
        datasets = open_splits(samples).values()
        return np.stack([dataset.image(i) for dataset in datasets for i in range(len(dataset))]).astype(np.float64)

    exact = pictures(*REFERENCE)

    def distance(name: str, evaluations: int) -> str:
        of_each = np.sqrt(np.square(pictures(name, evaluations) - exact).mean(axis=(1, 2, 3)))
        return f"{np.median(of_each):.2f}, {np.quantile(of_each, 0.9):.2f}"

    return distance


def told(scores: Artifact) -> str:
    manifest = read_manifest(scores.uri)
    assert manifest is not None, "just made"
    metrics = manifest.metrics
    if "train/composition" in metrics:
        return f"{metrics['train/composition']:.3f}, {metrics['heldout/composition']:.3f}"
    [distance] = [value for name, value in metrics.items() if name.startswith("train/frechet_clip")]
    recall = metrics.get("train/recall_at_10")
    return f"{1000 * distance:.1f}" + ("" if recall is None else f", {recall:.3f}")


if __name__ == "__main__":
    main()
