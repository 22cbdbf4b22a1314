"""What each choice does to the demo decoder's held-out error at equal compute.

    python tests/benchmarks/ablations.py [--samples 40960] [--seeds 3] [--store runs/ablations]

A choice is an override of configs/pipeline/demo.yaml, as anybody would give it; the decoder reads captions, which the
demo's does not. All are trained with equal arithmetic (samples are adjusted to what a sample costs), and compared by
the mean squared error of the denoised latents at five log-SNRs, which means the same for every schedule and prediction.
The first run makes shards, encoders and features.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from statistics import mean, stdev
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from genpipe.artifacts import Artifact, fetch
from genpipe.diffusion.process import DiffusionConfig, denoiser
from genpipe.diffusion.schedules import alpha_sigma, expand_like, time_at
from genpipe.generation.conditions import Text, embed_statistics
from genpipe.generation.latents import decoder_model
from genpipe.launch.local import run_local
from genpipe.pipeline.costs import cost_of
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import Planned, plan, spec_of
from genpipe.weights import load_weights

DEMO = "configs/pipeline/demo.yaml"
CHOICES: dict[str, list[str]] = {
    "as the demo (flow, logit-normal times)": [],
    "flow, uniform times": ["diffusion.time_sampling=uniform"],
    "v on cosine": ["diffusion={schedule: cosine, predict: v, time_sampling: uniform}"],
    "v on cosine, min-SNR 5": ["diffusion={schedule: cosine, predict: v, time_sampling: uniform, min_snr_gamma: 5}"],
    "x0 on cosine": ["diffusion={schedule: cosine, predict: x0, time_sampling: uniform}"],
    "eps on DDPM's linear": ["diffusion={schedule: linear, predict: eps, time_sampling: uniform}"],
    "EDM": ["diffusion={schedule: edm, predict: edm, sigma_data: 1.0, time_sampling: log_normal, weighting: edm}"],
    "eps and learned variance": [
        "diffusion={schedule: cosine_iddpm, predict: eps, variance: learned, time_sampling: uniform}"
    ],
    "text kept in 90 % instead of 50 %": ["drop_text=0.1"],
    "empty caption as null": ["model.null_text=encoder"],
    "Muon": ["train.optim={kind: muon, lr: 4.0e-3, adamw_lr: 2.0e-3}"],
    "U-Net": [
        "model.denoiser={kind: unet, width: 64, multipliers: [1, 2], blocks: 1, attention_at: [2], head_width: 32}"
    ],
}
LOG_SNRS = (-4.0, -2.0, 0.0, 2.0, 4.0)
HELD_OUT = 128


class Trial(NamedTuple):
    choice: str
    overrides: list[str]
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40_960, help="of the demo's own decoder; others as many FLOPs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--store", default="runs/ablations")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    base = [f"store={options.store}", "stages.decoder.text=true", "stages.decoder.observe.validate_every=0"]
    pipeline = load_pipeline(DEMO, base)
    for name in ("shard", "autoencoder", "clip", "features"):
        run_local(spec_of(plan(pipeline, only=[name])[-1], pipeline))
        print(f"{name} is there", flush=True)
    reference = flops(base) * options.samples
    trials = []
    for choice, settings in CHOICES.items():
        overrides = [*base, *(f"stages.decoder.{setting}" for setting in settings)]
        samples = round(reference / flops(overrides) / 64) * 64
        overrides += [f"stages.decoder.train.samples={samples}", "stages.decoder.train.warmup_samples=3200"]
        trials += [Trial(choice, overrides, seed) for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.processes) as pool:
        found = zip(trials, pool.map(run, trials), strict=True)
        show({(trial.choice, trial.seed): error for trial, error in found}, seeds=options.seeds)


def flops(overrides: list[str]) -> float:
    """Of one sample of the decoder."""
    planned = plan(load_pipeline(DEMO, overrides), only=["decoder"])[-1]
    return cost_of(planned.instance.stage, planned.instance.cfg, planned.inputs).flops


def run(trial: Trial) -> float:
    """Train a decoder and return its held-out error."""
    pipeline = load_pipeline(DEMO, [*trial.overrides, f"stages.decoder.train.seed={trial.seed}"])
    planned = plan(pipeline, only=["decoder"])[-1]
    error = held_out_error(run_local(spec_of(planned, pipeline)), planned)
    print(f"{trial.choice}, seed {trial.seed}: {error:.4f}", flush=True)
    return error


@torch.no_grad()
def held_out_error(artifact: Artifact, planned: Planned) -> float:
    """Mean squared error of the denoised latents (unit variance) of held-out samples, over LOG_SNRS."""
    device = torch.device("cpu")
    module, extra = load_weights(fetch(artifact), kind="decoder", device=device)
    cfg = DiffusionConfig.model_validate(extra["diffusion"])
    split = planned.instance.stage.data(planned.instance.cfg, planned.inputs).heldout
    indices = torch.arange(min(HELD_OUT, split.length)).numpy()
    batch = split.collate(indices, indices)
    x0, text = batch["latents"].float(), Text.from_cache(batch)
    embeds = embed_statistics(planned.inputs["features"].meta, device).standardize(batch["image_embeds"])
    keep = torch.zeros(len(x0), dtype=torch.bool)
    denoise = denoiser(decoder_model(module, embeds, text, drop_image=keep, drop_text=keep), cfg)  # type: ignore[arg-type]
    errors = []
    for number, log_snr in enumerate(LOG_SNRS):
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(number))
        ratio = torch.full((len(x0),), log_snr / 2).exp()
        t_B = time_at(ratio, torch.ones_like(ratio), cfg.noise_schedule)
        alpha, sigma = (expand_like(level, x0) for level in alpha_sigma(t_B, cfg.noise_schedule))
        errors.append((denoise(alpha * x0 + sigma * noise, t_B)[:, : x0.shape[1]] - x0).square().mean().item())
    return mean(errors)


def show(errors: dict[tuple[str, int], float], *, seeds: int) -> None:
    first = next(iter(CHOICES))
    print(f"\n| choice | held-out error, {seeds} seeds | beside the demo's |\n|---|---|---|")
    base = mean(errors[first, seed] for seed in range(seeds))
    for choice in CHOICES:
        values = [errors[choice, seed] for seed in range(seeds)]
        spread = stdev(values) if seeds > 1 else 0.0
        print(f"| {choice} | {mean(values):.4f} ± {spread:.4f} | {100 * (mean(values) / base - 1):+.1f} % |")


if __name__ == "__main__":
    main()
