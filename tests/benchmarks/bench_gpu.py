"""What one GPU does of its peak in the real loop, and how much memory it takes beside what `genpipe plan` says.

    python tests/benchmarks/bench_gpu.py [--only NAME] [--channels-last] [--compile]

The loop is `genpipe.training.loop.train` with its loader, optimizer and average; batches are random and in memory. The
peak is that of a product of bf16 matrices in the same run. FLOPs are those of `genpipe plan`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "training")]

from folder_runtime import FolderRuntime  # noqa: E402

from genpipe import config  # noqa: E402
from genpipe.data.loader import Batch, Data, SampleSet  # noqa: E402
from genpipe.diffusion.process import DiffusionConfig, training_loss  # noqa: E402
from genpipe.models.autoencoder import build_autoencoder  # noqa: E402
from genpipe.models.clip import CLIP, CLIPConfig  # noqa: E402
from genpipe.models.decoder import Decoder, DecoderConfig  # noqa: E402
from genpipe.models.ldm_autoencoder import LdmConfig  # noqa: E402
from genpipe.models.precision import gflops  # noqa: E402
from genpipe.pipeline.costs import cost_of  # noqa: E402
from genpipe.stage_config import Resources  # noqa: E402
from genpipe.training.loop import train  # noqa: E402
from genpipe.training.objective import Metrics, ObserveTraining, Step, Validation  # noqa: E402
from genpipe.training.settings import TrainConfig  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS, WIDTH, EMBED = 77, 512, 512
STEPS, LOG_EVERY = 60, 20


@dataclass
class Objective:
    """One module and its loss, without validation."""

    model: nn.Module
    of: Any

    def __post_init__(self) -> None:
        self.trainable: dict[str, nn.Module] = {"model": self.model}

    def active(self, samples_seen: int) -> tuple[str, ...]:
        return ("model",)

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        loss: Tensor = self.of(self.model, batch, step)
        return loss, {}

    def after_step(self) -> None: ...

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        return Validation({})


def clip_loss(model: Any, batch: Batch, step: Step) -> Tensor:
    return model.loss(model.encode_image(batch["images"]), model.encode_text(batch["tokens"])[0])  # type: ignore[no-any-return]


def decoder_loss(model: Decoder, batch: Batch, step: Step, *, diffusion: DiffusionConfig) -> Tensor:
    count = len(batch["latents"])
    drop = torch.zeros(count, dtype=torch.bool, device=batch["latents"].device)
    text_mask = torch.ones(count, TOKENS, dtype=torch.bool, device=drop.device)
    bound = partial(
        model, image_embed=batch["image_embed"], text_encodings=batch["text_encodings"], text_mask=text_mask,
        drop_image=drop, drop_text=drop,
    )  # fmt: skip
    return training_loss(bound, batch["latents"], diffusion, generator=step.generator).mean()


def autoencoder_loss(model: Any, batch: Batch, step: Step) -> Tensor:
    mean, _ = model.encode(batch["images"])
    return F.l1_loss(model.decode(mean), batch["images"])


def decoder_batch(size: int, *, channels: int, side: int) -> Batch:
    return {
        "latents": torch.randn(size, channels, side, side),
        "image_embed": torch.randn(size, EMBED),
        "text_encodings": torch.randn(size, TOKENS, WIDTH),
    }


def cases() -> dict[str, tuple[Any, Any, Any, int]]:
    """By name: how to build the model, its loss, a batch of a size, and the size."""
    clip_cfg = config.parse(CLIPConfig, config.load(CONFIGS / "model/clip/vit-b-16.yaml"))
    clip_sizes = {"vocab_size": 49408, "context_length": TOKENS, "eot_id": 49407}
    single = config.load(CONFIGS / "pipeline/single-gpu.yaml")
    unet = config.parse(DecoderConfig, single.at("stages", "decoder", "model"))
    diffusion = config.parse(DiffusionConfig, single.at("stages", "decoder", "diffusion"))
    dit = DecoderConfig.model_validate(
        {"denoiser": {"kind": "dit", "patch_size": 2, "width": 1024, "depth": 24, "heads": 16}}
    )
    flow = DiffusionConfig(schedule="flow", predict="flow", time_sampling="logit_normal")
    known = {"embed_dim": EMBED, "text_width": WIDTH}

    def images(side: int, size: int) -> Batch:
        return {"images": torch.rand(size, 3, side, side) * 2 - 1}

    def pairs(size: int) -> Batch:
        return {**images(224, size), "tokens": torch.full((size, TOKENS), 49407)}

    return {
        "CLIP ViT-B/16, 224 px": (lambda: CLIP(clip_cfg, **clip_sizes), clip_loss, pairs, 512),
        "U-Net of single-gpu, 64 px": (
            lambda: Decoder(unet, latent_channels=3, out_channels=3, **known),
            partial(decoder_loss, diffusion=diffusion),
            partial(decoder_batch, channels=3, side=64),
            128,
        ),
        "DiT-L/2, 32 x 32 latents": (
            lambda: Decoder(dit, latent_channels=4, out_channels=4, **known),
            partial(decoder_loss, diffusion=flow),
            partial(decoder_batch, channels=4, side=32),
            128,
        ),
        "autoencoder f8, 256 px": (
            lambda: build_autoencoder(LdmConfig(kind="ldm", latent_channels=4, multipliers=(1, 2, 4, 4))),
            autoencoder_loss,
            partial(images, 256),
            12,
        ),
    }


def measure(
    name: str,
    build: Any,
    loss: Any,
    batch: Any,
    size: int,
    *,
    peak: float,
    device: torch.device,
    channels_last: bool,
    compiled: bool,
) -> None:
    train_cfg = TrainConfig.model_validate(
        {"samples": STEPS * size, "global_batch_size": size, "optim": {"kind": "adamw", "lr": 1e-4}}
    )
    stage = ModuleType("bench")
    stage.objective = lambda cfg, inputs, where: Objective(build(), loss)  # type: ignore[attr-defined]
    stage.example_batch = lambda cfg, inputs, *, batch_size: batch(batch_size)  # type: ignore[attr-defined]
    cost = cost_of(stage, SimpleNamespace(train=train_cfg, resources=Resources()), {})
    with torch.device(device):
        model = build()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    objective = Objective(model, loss)
    one = batch(size)
    samples = SampleSet(size, lambda indices, positions: dict(one))
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        rt = FolderRuntime(Path(folder), device=device)
        resources = Resources(compile=compiled, checkpoint_seconds=3600)
        began = time.perf_counter()
        train(objective, Data(samples, samples), train_cfg, rt, resources, ObserveTraining(log_every=LOG_EVERY))
        took = time.perf_counter() - began
    rates = [logged["samples_per_second"] for logged in rt.logged.values() if "samples_per_second" in logged][1:]
    waits = [logged["data_wait_share"] for logged in rt.logged.values() if "data_wait_share" in logged][1:]
    achieved = float(np.median(rates)) * cost.flops / 1e12
    taken = torch.cuda.max_memory_allocated() / 2**30
    parameters = sum(cost.parameters.values()) / 1e6
    if compiled:
        extra = took - STEPS * size / float(np.median(rates))
        print(f"{name}: compiled: {rt.environment['compiled']}, {extra:.0f} s more than the steps take")
    print(
        f"{name:28} {parameters:7.0f} M  batch {size:4}  {np.median(rates):8.0f} samples/s  {achieved:6.0f} TFLOP/s  "
        f"{achieved / peak:5.0%} of {peak:.0f}  data wait {np.median(waits):4.0%}  "
        f"memory {taken:6.1f} GiB, planned {cost.peak / 2**30:6.1f} ({taken / (cost.peak / 2**30):.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="what one GPU does of its peak in the loop")
    parser.add_argument("--only", default="", help="the networks whose name holds this")
    parser.add_argument("--channels-last", action="store_true", help="lay images out as NHWC")
    parser.add_argument("--compile", action="store_true", help="with compiled blocks, where they are found right")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    device = torch.device("cuda")
    torch.set_float32_matmul_precision("medium")
    rates = {name: gflops(device, dtype) / 1e3 for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: "
        + ", ".join(f"{k} {v:.0f} TFLOP/s" for k, v in rates.items())
    )
    for name, case in cases().items():
        if options.only in name:
            layout, compiled = options.channels_last, options.compile
            measure(name, *case, peak=rates["bf16"], device=device, channels_last=layout, compiled=compiled)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
