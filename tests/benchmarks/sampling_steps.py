"""How good a system's pictures are after how many steps, by sampler.

    python tests/benchmarks/sampling_steps.py [--config configs/pipeline/demo.yaml] [--store runs/demo] [--part decoder]

The pipeline's stages must be made (`make demo`); what is drawn and measured beside them goes to the same store. For
each sampler and number of steps of one part of the system, the others as configured, it draws the same captions with
the same seeds. Cost is the number of evaluations of the network: heun takes two a step, the others one.

`--by clip` draws training captions and prints the Frechet distance to their real pictures in the judge's embeddings
(times 1,000) and how many pictures have their own caption among the ten nearest. `--by composition`, for
configs/pipeline/shapes.yaml, prints the share of pictures that show what was asked for, of training captions and of
held-out ones, as many of each.
"""

from __future__ import annotations

import argparse
from typing import Any

from judging import made

from genpipe.artifacts import Artifact, read_manifest

METRICS = {
    "clip": "{retrieval: {recall_at: [10]}, frechet: {network: {kind: clip}}}",
    "composition": "{composition: {}}",
}
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
    parser.add_argument("--by", default="clip", choices=list(METRICS))
    options = parser.parse_args()
    heldout = 0 if options.by == "clip" else options.captions
    fixed = (
        f"store={options.store}",
        "tracking.uri=jsonl",
        f"stages.sample.prompts={{kind: captions, train: {options.captions}, heldout: {heldout}}}",
        f"stages.evaluate.metrics={METRICS[options.by]}",
        "stages.evaluate.observe.gates={}",
    )
    print(
        f"\n| {options.part} | {' | '.join(map(str, options.evaluations))} |\n|---|{'---|' * len(options.evaluations)}"
    )
    for name in options.samplers:
        cells = []
        for evaluations in options.evaluations:
            steps = evaluations // 2 if name == "heun" else evaluations
            drawn = [f"stages.system.model.{options.part}.{key}={value}" for key, value in SAMPLERS[name].items()]
            scores = made(options.config, [*fixed, *drawn, f"stages.system.model.{options.part}.steps={steps}"])
            cells.append(told(scores))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def told(scores: Artifact) -> str:
    manifest = read_manifest(scores.uri)
    assert manifest is not None, "just made"
    metrics = manifest.metrics
    if "train/composition" in metrics:
        return f"{metrics['train/composition']:.3f}, {metrics['heldout/composition']:.3f}"
    [distance] = [value for name, value in metrics.items() if name.startswith("train/frechet_clip")]
    return f"{1000 * distance:.1f}, {metrics['train/recall_at_10']:.3f}"


if __name__ == "__main__":
    main()
