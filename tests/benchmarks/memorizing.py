"""Whether the memorization report tells a system that copies from one that does not.

    python tests/benchmarks/memorizing.py [--shards runs/demo/artifacts/shards/FINGERPRINT] [--steps 5000]

An unconditional diffusion model on 32 x 32 pixels, trained alike on 16 and on 1,600 pictures of the demo for as many
steps; 200 other pictures are held out of both. Each draws 256.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from genpipe.artifacts import find, read_manifest
from genpipe.data.shard_dataset import open_shards
from genpipe.data.shards import split_of
from genpipe.launch.local import run_local
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import plan, spec_of

HELDOUT = 200
LEVEL = 0.01
CONFIG = """
name: memorizing-{count}
store: {store}
tracking: {{uri: jsonl}}
stages:
  shard:
    source: {{kind: folder, path: {folder}}}
    image_size: 32
    heldout_fraction: {heldout}
  decoder:
    kind: pixel_decoder
    image_size: 32
    model: {{denoiser: {{kind: dit, patch_size: 4, width: 192, depth: 4, heads: 4}}}}
    diffusion: {{schedule: flow, predict: flow, time_sampling: logit_normal}}
    train:
      samples: {samples}
      global_batch_size: 16
      optim: {{kind: adamw, lr: 1.0e-3}}
      ema_decay: 0.995
  system: {{model: {{kind: pixel, decoder: {{steps: 25}}}}}}
  sample: {{prompts: {{kind: none, count: 256}}, batch_size: 64}}
  evaluate:
    metrics: {{memorization: {{networks: [{{kind: pixels}}], level: {level}}}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="the artifact of the demo's shards")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--store", default="runs/memorizing")
    options = parser.parse_args()
    configs = [write_config(count, options) for count in (16, 1600)]
    with ProcessPoolExecutor(len(configs)) as pool:
        found = list(pool.map(run, configs))
    print("\n| pictures trained on | memorized | held-out pictures by the same rule | copying_z |\n|---|---|---|---|")
    for count, metrics in zip((16, 1600), found, strict=True):
        names = ("train/memorized", "memorized_heldout", "train/copying_z_pixels")
        print(f"| {count:,} | {' | '.join(f'{metrics[name]:.3g}' for name in names)} |")


def write_config(count: int, options: argparse.Namespace) -> Path:
    """A pipeline on `count` pictures to train on and HELDOUT others, which the split by hash happens to choose."""
    folder = Path(options.store, f"pictures-{count}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    heldout = HELDOUT / (count + HELDOUT)
    dataset = open_shards(find(options.shards), split="train")
    wanted = {"train": count, "heldout": HELDOUT}
    for i in range(len(dataset)):
        split = split_of(f"{i:05d}", heldout_fraction=heldout, seed=0)
        if wanted[split]:
            wanted[split] -= 1
            (folder / f"{i:05d}.jpg").write_bytes(dataset.image_bytes(i))
            (folder / f"{i:05d}.txt").write_text(dataset.captions(i)[0])
    path = Path(options.store, f"memorizing-{count}.yaml")
    settings = {"folder": folder, "heldout": heldout, "samples": 16 * options.steps, "level": LEVEL}
    path.write_text(CONFIG.format(count=count, store=Path(options.store, f"of-{count}").absolute(), **settings))
    return path


def run(config: Path) -> dict[str, float]:
    """All stages, and the numbers at the end."""
    pipeline = load_pipeline(str(config))
    for planned in plan(pipeline):
        if planned.status == "run":
            run_local(spec_of(planned, pipeline))
            print(f"{config.stem}: {planned.name} is there", flush=True)
    manifest = read_manifest(plan(pipeline)[-1].artifact.uri)
    return dict(manifest.metrics)


if __name__ == "__main__":
    main()
