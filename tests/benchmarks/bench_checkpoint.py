"""How long training stands still for a checkpoint, beside `torch.save` of the same state to the same disk, in pairs.

    python tests/benchmarks/bench_checkpoint.py [--pairs 20] [--folder FOLDER]

Expect at most a quarter, with one rank and with two. `torch.save` is timed until it returns, without an fsync and
without a sum; ours is durable and summed, in the background. With two ranks the longer stall counts, and rank 0 saves.
The large model has a quarter of the pairs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from table import single_thread

single_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "training")]

from folder_runtime import FolderRuntime  # noqa: E402

from genpipe import config  # noqa: E402
from genpipe.models.decoder import Decoder, DecoderConfig  # noqa: E402
from genpipe.training.settings import TrainConfig  # noqa: E402
from genpipe.training.state import TrainState  # noqa: E402

STAGE = Path(__file__).parents[2] / "configs/stage/decoder.yaml"
LARGE = {"denoiser": {"kind": "dit", "patch_size": 2, "width": 768, "depth": 12, "heads": 12}}


def decoder(cfg: DecoderConfig) -> Decoder:
    return Decoder(cfg, latent_channels=4, embed_dim=256, text_width=256)


MODELS: dict[str, Callable[[], Decoder]] = {
    "the demo's decoder": lambda: decoder(config.parse(DecoderConfig, config.load(STAGE).at("model"))),
    "DiT-B": lambda: decoder(DecoderConfig.model_validate(LARGE)),
}


def step(state: TrainState) -> None:
    """An optimizer step on gradients of no meaning: every tensor changes."""
    for p in state.trainable["model"].parameters():
        p.grad = torch.full_like(p, 1e-3)
    for optimizer in state.optimizers["model"]:
        optimizer.step()
        optimizer.zero_grad()
    state.emas["model"].update()
    state.samples_seen += 1


def saved_by_torch(state: TrainState, path: Path) -> None:
    """What checkpoints were before: rank 0 writes everything while the others wait."""
    model, optimizers = state.trainable["model"], state.optimizers["model"]
    everything = [model.state_dict(), [o.state_dict() for o in optimizers], state.emas["model"].state_dict()]
    torch.save(everything, path)


def run(rank: int, world_size: int, name: str, folder: str, pairs: int) -> None:
    """One rank: the stalls in turn, and on rank 0 what they were."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    rt = FolderRuntime(Path(folder), rank=rank, world_size=world_size)
    state = TrainState.fresh({"model": MODELS[name]()}, TrainConfig(samples=1, global_batch_size=1))
    state.resume(rt)
    step(state)
    state.save(rt)  # once, so that its memory is there
    state.wait(rt)

    def ours() -> None:
        state.save(rt)

    def torchs() -> None:
        if rank == 0:
            saved_by_torch(state, Path(folder, "state.pt"))

    stalls: dict[str, list[tuple[float, float]]] = {"ours": [], "torch.save": []}
    writes: list[float] = []
    turns = random.Random(0)
    for _ in range(pairs):
        for contender in turns.sample(["ours", "torch.save"], 2):
            step(state)
            stalls[contender].append(longest(ours if contender == "ours" else torchs, world_size))
            state.wait(rt)
        writes.append(state.write_seconds)
    if rank == 0:
        parameters = sum(p.numel() for p in state.trainable["model"].parameters())
        size = sum(tensor.nbytes for tensor in state.tensors().values())
        report(
            f"{name}, {parameters / 1e6:.1f} M parameters, {size / 1e6:,.0f} MB, {world_size} rank(s)", stalls, writes
        )
    if world_size > 1:
        dist.destroy_process_group()


def longest(save: Callable[[], None], world_size: int) -> tuple[float, float]:
    """Seconds of the clock, and of CPU in the loop's thread, of the slowest rank; the ranks meet before and after."""
    if world_size > 1:
        dist.barrier()
    begun, busy = time.perf_counter(), time.thread_time()
    save()
    times = torch.tensor([time.perf_counter() - begun, time.thread_time() - busy], dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
    wall, cpu = times.tolist()
    return wall, cpu


def report(title: str, stalls: dict[str, list[tuple[float, float]]], writes: list[float]) -> None:
    print(f"{title}; committed after {median(writes):.2f} s")
    for i, clock in enumerate(("wall", "CPU")):
        ours, torchs = (np.array([pair[i] for pair in pairs]) for pairs in stalls.values())
        ratios = ours / torchs
        draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
        low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
        print(
            f"  {clock:4} {np.median(ours) * 1e3:8.1f} ms, torch.save {np.median(torchs) * 1e3:8.1f} ms: ratio "
            f"{np.median(ratios):.3f} (95 % interval {low:.3f} to {high:.3f}; pairs {ratios.min():.3f} to "
            f"{ratios.max():.3f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk that is meant; default: the temporary one"
    )
    options = parser.parse_args()
    for name, pairs in zip(MODELS, (options.pairs, max(1, options.pairs // 4)), strict=True):
        for world_size in (1, 2):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                arguments = (world_size, name, folder, pairs)
                if world_size == 1:
                    run(0, *arguments)
                else:
                    mp.spawn(run, args=arguments, nprocs=world_size)


if __name__ == "__main__":
    main()
