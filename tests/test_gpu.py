"""What only a GPU can show: that stages train on it with torch alone, give the CPU's numbers, and resume exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import memory_ranks
import parallel_ranks
import pytest
import torch
import torch.distributed as dist
from conftest import TinyPipeline
from folder_runtime import FolderRuntime, train_stage, weights
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from genpipe.artifacts import read_manifest
from genpipe.models.autoencoder import build_autoencoder
from genpipe.models.clip import CLIP, CLIPConfig
from genpipe.models.decoder import Decoder, DecoderConfig
from genpipe.models.ldm_autoencoder import LdmConfig
from genpipe.models.precision import products_of
from genpipe.pipeline.costs import cost_of
from genpipe.stage_config import Resources
from genpipe.training.ema import Ema
from genpipe.training.loop import Interrupted
from genpipe.training.sharding import local

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

TRAINED = ("autoencoder", "clip", "prior", "decoder", "upsampler")
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def gpu_pipeline(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> TinyPipeline:
    return TinyPipeline(tmp_path_factory.mktemp("gpu"), shapes)


@pytest.fixture
def exact() -> Iterator[None]:
    """Kernels that add in the same order each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stage", TRAINED)
def test_every_stage_trains_on_the_gpu(gpu_pipeline: TinyPipeline, stage: str) -> None:
    """In bf16, which the probe finds to be the faster; the loss falls, and what was used is on record."""
    made = gpu_pipeline.run(stage, "tracking.uri=jsonl")
    manifest = read_manifest(made.uri)
    assert manifest is not None and manifest.environment["precision_used"] == "bf16"
    [log] = Path(gpu_pipeline.store).glob(f"runs/{stage}/{made.fingerprint[:16]}*/metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["metrics"][f"{stage}/loss"] for line in lines if f"{stage}/loss" in line.get("metrics", {})]
    assert losses[-1] < 0.95 * losses[0], losses


def test_auto_takes_what_the_hardware_is_fast_at() -> None:
    assert products_of("auto", GPU) == "bf16"


def largest_relative(found: Tensor, expected: Tensor) -> float:
    return ((found.cpu() - expected).abs().max() / expected.abs().max()).item()


def test_networks_give_the_numbers_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as convolutions otherwise do
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    small = {"width": 32, "depth": 2, "heads": 2}
    clip = CLIP(
        CLIPConfig.model_validate({"embed_dim": 16, "image_size": 32, "patch_size": 8, "image": small, "text": small}),
        vocab_size=300,
        context_length=12,
        eot_id=299,
    )
    autoencoder = build_autoencoder(LdmConfig(kind="ldm", width=32, latent_channels=4, multipliers=(1, 2), blocks=1))
    unet = {"kind": "unet", "width": 32, "multipliers": [1, 2], "blocks": 1, "attention_at": [2], "heads": 2}
    decoder = Decoder(
        DecoderConfig.model_validate({"denoiser": unet}), latent_channels=3, out_channels=3, embed_dim=16, text_width=24
    )
    for module in decoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.05)  # zeros at the start would hide all but the skip
    keep = torch.zeros(2, dtype=torch.bool)
    conditions = {
        "image_embed": torch.randn(2, 16),
        "text_encodings": torch.randn(2, 12, 24),
        "text_mask": torch.ones(2, 12, dtype=torch.bool),
        "drop_image": keep,
        "drop_text": keep,
    }
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        expected = [clip.encode_image(images), autoencoder.encode(images)[0], decoder(images, t, **conditions)]
        for module in (clip, autoencoder, decoder):
            module.to(GPU)
        on_gpu = {name: value.to(GPU) for name, value in conditions.items()}
        found = [
            clip.encode_image(images.to(GPU)),
            autoencoder.encode(images.to(GPU))[0],
            decoder(images.to(GPU), t.to(GPU), **on_gpu),
        ]
    assert [largest_relative(*pair) < 1e-3 for pair in zip(found, expected, strict=True)] == [True] * 3


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder"])
def test_an_interrupted_run_resumed_is_the_run_bitwise(
    gpu_pipeline: TinyPipeline, stage: str, tmp_path: Path, exact: None
) -> None:
    """On one GPU with kernels that are exact: 1,280 samples are 640, a stop, a resume, and 640."""
    spec = gpu_pipeline.spec(stage, "tracking.uri=jsonl")
    whole, _ = train_stage(spec, FolderRuntime(tmp_path / "whole", device=GPU))
    with pytest.raises(Interrupted):
        train_stage(spec, FolderRuntime(tmp_path / "cut", stop_at=640, device=GPU), resources=Resources())
    resumed, _ = train_stage(spec, FolderRuntime(tmp_path / "cut", device=GPU))
    first, second = weights(whole), weights(resumed)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_memory_is_what_the_gpu_allocates(tmp_path: Path) -> None:
    """The plan's parts, as torch's allocator rounds them, by one rank with and without recomputing."""
    for again in (False, True):
        cfg = memory_ranks.config(workers=1, recompute_blocks=again)
        planned = cost_of(memory_ranks.stage(), cfg, {}).peak
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(GPU)
        torch.cuda.reset_peak_memory_stats(GPU)
        memory_ranks.steps_as_the_loop_takes_them(cfg, FolderRuntime(tmp_path, device=GPU))
        workspace = 32 * 2**20  # at the most, of cuBLAS
        assert 0.95 * planned < torch.cuda.max_memory_allocated(GPU) - before < 1.05 * planned + workspace


@pytest.mark.parametrize("sharded", [False, True])
def test_averages_in_host_memory_have_the_same_bits(tmp_path: Path, sharded: bool) -> None:
    """Pinned, with more tensors under way than are waited for; as those of FSDP, too."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        module = nn.Sequential(*(nn.Linear(1000, 1000, device=GPU) for _ in range(20)))
        if sharded:
            fully_shard(module)
        there, away = Ema(module, decay=0.9), Ema(module, decay=0.9, offloaded=True)
        assert all(local(shadow).is_pinned() for shadow in away.shadow.values())
        for _ in range(5):
            with torch.no_grad():
                for p in module.parameters():
                    local(p.detach()).normal_()
            there.update()
            away.update()
        one, other = there.gathered(keep=True), away.gathered(keep=True)
    finally:
        dist.destroy_process_group()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_sharded_training_on_one_gpu_is_training(gpu_pipeline: TinyPipeline, tmp_path: Path) -> None:
    """NCCL with one rank: the weights of FSDP's own way are those of a plain run, to rounding."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain = parallel_ranks.train_on(FolderRuntime(tmp_path / "plain", device=GPU), sharded=False)
        sharded = parallel_ranks.train_on(FolderRuntime(tmp_path / "sharded", device=GPU), sharded=True)
    finally:
        dist.destroy_process_group()
    for name, tensor in plain.items():
        torch.testing.assert_close(sharded[name], tensor, atol=1e-5, rtol=1e-4)
