"""What a training stage costs, before anything is trained: parameters, arithmetic and memory.

The stage's own objective is built and stepped on the meta device, where tensors have shapes and no content: the figures
are those of its code, and nothing here knows a model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from genpipe.artifacts import Artifact
from genpipe.models.blocks import blocks_of, recompute_blocks
from genpipe.training.objective import Batch, Objective, Step
from genpipe.training.optim import optimizer_bytes
from genpipe.training.settings import TrainConfig

BYTES = 4
"""Of a parameter, a gradient and an average, which are kept in fp32 whatever the precision of the products."""

META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """Of one training stage. `memory` is in bytes, on each of its `workers`; `flops` of one sample.

    Of a range of workers it is the memory of the fewest, whose shares of a step are the largest, and the number is the
    most.
    """

    parameters: dict[str, int]
    frozen: int
    flops: float
    memory: dict[str, int]
    samples: int
    workers: int
    validator: float | None = None
    """GPUs of the process that validates beside the workers, by those of one of them; None where there is none."""

    @property
    def peak(self) -> int:
        """Bytes of all that `memory` lists."""
        return sum(self.memory.values())

    def gpu_hours(self, *, mfu: float, peak_tflops: float) -> float:
        """Hours of one GPU for the whole training, if it does a share `mfu` of its peak; a validator's are added."""
        hours = self.flops * self.samples / (mfu * peak_tflops * 1e12) / 3600
        return hours * (1 + (self.validator or 0.0) / self.workers)


def cost_of(stage: ModuleType, cfg: Any, inputs: Mapping[str, Artifact]) -> Cost:
    """Cost of a training stage whose inputs need not exist yet: their `meta` says what they promise.

    `flops` are those of a sample, forward and backward of every part (a product and its sum are two), as
    `torch.utils.flop_counter` counts them: matrix products, convolutions, attention. `memory` holds weights,
    gradients, the optimizer's state and the averages, of which a rank has its shards where `resources.shard_over` says
    so, and no averages where `resources.offload_averages` does; `gathered`, what sharding adds while blocks are
    computed; and what else is alive at the peak of a micro-batch, with attention in blocks as on a GPU. What libraries
    reserve comes on top.

    Raises ValueError where the ranks do not fit `resources.shard_over`.
    """
    train: TrainConfig = cfg.train
    batch_size = train.micro_batch(cfg.resources.min_workers)
    objective = _prepared(stage, cfg, inputs)
    train.check_trainable(objective.trainable)
    with META:
        batch: Batch = stage.example_batch(cfg, inputs, batch_size=batch_size)
        names = objective.active(train.samples) if train.samples else ()  # weights that stay as they begin
        steps = {name: _step(objective, name, batch, train) for name in names}
    parameters = {part: _count(module) for part, module in objective.trainable.items()}
    frozen = _frozen(objective)
    share = _Share(objective, ranks=cfg.resources.shards(cfg.resources.min_workers))
    held = sum(share.held(p) for module in objective.trainable.values() for p in module.parameters())
    averages = 1 + (len(train.ema_snapshots.sigma_rel) if train.ema_snapshots else 0)
    return Cost(
        parameters=parameters,
        frozen=frozen,
        flops=sum(step.flops / train.every(name) for name, step in steps.items()) / batch_size,
        memory={
            "weights": BYTES * (held * (2 if train.sam_rho else 1) + frozen),  # moved ones, and where they were
            "gradients": BYTES * held,
            "optimizer": sum(
                optimizer_bytes(module, train.of(name).optim, held=share.held)
                for name, module in objective.trainable.items()
            ),
            "averages": 0 if cfg.resources.offload_averages else BYTES * held * averages,
            "gathered": BYTES * share.gathered(),
            "activations": max((step.peak for step in steps.values()), default=0),
        },
        samples=train.samples,
        workers=cfg.resources.max_workers,
        validator=cfg.resources.validation.gpus / (cfg.resources.gpus or 1.0) if cfg.resources.validation else None,
    )


class _Share:
    """What one of several ranks holds of the parameters that they share, as `training.parallel` shards them."""

    def __init__(self, objective: Objective, *, ranks: int) -> None:
        self.ranks = ranks
        self.blocks = [block for module in objective.trainable.values() for block in blocks_of(module)]
        self.sharded = {p for block in self.blocks for p in block.parameters() if p.ndim}

    def held(self, p: Tensor) -> int:
        """Elements of a parameter that a rank has: all, or as many rows as the rank with the most."""
        return p.numel() // len(p) * -(-len(p) // self.ranks) if p in self.sharded else p.numel()

    def gathered(self) -> int:
        """Elements beside the shards, at the most, while blocks are computed.

        In the backward pass of a block they are its weights and gradients, the weights of the block to come, and the
        gradients of the block before, on their way to the other ranks.
        """
        if self.ranks == 1:
            return 0
        sizes = [0, *(sum(p.numel() for p in block.parameters() if p.ndim) for block in self.blocks), 0]
        return max(before + 2 * size + after for before, size, after in zip(sizes, sizes[1:], sizes[2:], strict=False))


def training_flops(stage: ModuleType, cfg: Any, inputs: Mapping[str, Artifact]) -> float:
    """FLOPs of a whole training, as `cost_of` counts them."""
    train: TrainConfig = cfg.train
    batch_size = train.micro_batch(cfg.resources.min_workers)
    objective = _prepared(stage, cfg, inputs)
    total = 0.0
    with META:
        batch: Batch = stage.example_batch(cfg, inputs, batch_size=batch_size)
        for name in objective.active(train.samples) if train.samples else ():
            total += _step(objective, name, batch, train).flops / train.every(name)
    return total * train.samples / batch_size


def on_meta(stage: ModuleType, cfg: Any, inputs: Mapping[str, Artifact]) -> Objective:
    """The objective of a training stage on the meta device, where nothing is read and nothing takes memory."""
    with META:
        objective: Objective = stage.objective(cfg, {name: _promised(a) for name, a in inputs.items()}, META)
    return objective


def _prepared(stage: ModuleType, cfg: Any, inputs: Mapping[str, Artifact]) -> Objective:
    """The objective on the meta device, with blocks recomputed if they are in training."""
    objective = on_meta(stage, cfg, inputs)
    if cfg.resources.recompute_blocks:
        for module in objective.trainable.values():
            recompute_blocks(module)
    return objective


def _promised(artifact: Artifact) -> Artifact:
    """With statistics in the meta, which are only known when the artifact is made; here their number counts."""
    meta = dict(artifact.meta)
    for size, name in (("latent_channels", "latent"), ("embed_dim", "image_embed")):
        if size in meta:
            meta.setdefault(f"{name}_mean", [0.0] * meta[size])
            meta.setdefault(f"{name}_std", [1.0] * meta[size])
    return artifact.model_copy(update={"meta": meta})


def _step(objective: Objective, part: str, batch: Batch, train: TrainConfig) -> _Counted:
    """One micro-batch of a part, forward and backward: its FLOPs, and the peak beside weights and gradients."""
    for name, module in objective.trainable.items():
        module.requires_grad_(name == part)
        for p in module.parameters():
            p.grad = torch.zeros_like(p)  # to be added to, as all but the first micro-batch of a step do
    with _Counted() as counted:
        _run(objective, part, batch, train)
    counted.flops *= 2 if train.sam_rho else 1
    return counted


def _run(objective: Objective, part: str, batch: Batch, train: TrainConfig) -> None:
    """One micro-batch of a part, forward and backward."""
    with _AsOnAGpu(bf16=train.precision != "fp32"):
        loss, _ = objective.loss(part, batch, Step(samples_seen=train.samples, generator=torch.Generator()))
        # By the engine itself: `backward` would turn the mode off, but checkpointed blocks are computed again in it.
        run_backward = torch.autograd.Variable._execution_engine.run_backward
        run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _frozen(objective: Objective) -> int:
    """Parameters of the networks that the objective uses and does not train."""
    trained = set(map(id, objective.trainable.values()))
    modules = [x for x in vars(objective).values() if isinstance(x, nn.Module) and id(x) not in trained]
    return sum(_count(module) for module in modules)


class _Counted(TorchDispatchMode):
    """FLOPs of what is computed inside, and bytes of what is made there and alive at once, at the peak.

    (`FlopCounterMode` keeps what passes through checkpoints, so that its peak would be another.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for x in self._storages((args, kwargs)):
            self.seen.setdefault(x, True)  # made outside, or seen before
        out = function(*args, **kwargs)
        if count := flop_registry.get(function.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        for x in self._storages(out):
            if x not in self.seen:
                self.seen[x] = True
                self.now += x.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(x, self._gone, x.nbytes())
        return out

    def _storages(self, values: Any) -> list[torch.UntypedStorage]:
        return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]

    def _gone(self, size: int) -> None:
        self.now -= size


class _AsOnAGpu(TorchFunctionMode):
    """What a GPU would do and the meta device does not: bf16 products under autocast, and attention in blocks."""

    PRODUCTS = frozenset(
        (F.linear, F.conv2d, F.conv_transpose2d, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, Tensor.matmul)
    ) | {Tensor.__matmul__}
    WHOLE = frozenset((F.layer_norm, F.group_norm, F.softmax, torch.softmax, F.cross_entropy, F.mse_loss, F.l1_loss))

    def __init__(self, *, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*self._cast(args, torch.bfloat16)[:3])
        if self.bf16 and function in self.PRODUCTS | self.WHOLE:
            dtype = torch.bfloat16 if function in self.PRODUCTS else torch.float32
            args, kwargs = self._cast(args, dtype), self._cast(kwargs, dtype)
        return function(*args, **kwargs)

    def _cast(self, values: Any, dtype: torch.dtype) -> Any:
        def cast(x: Any) -> Any:
            return x.to(dtype) if self.bf16 and isinstance(x, Tensor) and x.is_floating_point() else x

        return tree_map(cast, values)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return attended
