"""The loss scale against torch's own, and training in fp16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from folder_runtime import CPU, FolderRuntime, build, train_stage
from hypothesis import given
from hypothesis import strategies as st
from small_objective import G, stream, train_small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genpipe.models.precision import Products, autocast
from genpipe.stages import load_stage
from genpipe.training import loss_scale
from genpipe.training.loop import Interrupted
from genpipe.training.loss_scale import LossScale
from genpipe.training.objective import Step

if TYPE_CHECKING:
    from conftest import TinyPipeline

HALVES: tuple[Products, ...] = ("bf16", "fp16")


@given(st.lists(st.booleans(), max_size=40))
def test_the_scale_is_torchs_and_no_less_than_one(overflows: list[bool]) -> None:
    """With growth after 3 steps, so that both directions are met."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_STEPS", 3)
        scale, expected, growth = LossScale(CPU), torch.tensor(loss_scale.FIRST), torch.zeros((), dtype=torch.int32)
        for overflow in overflows:
            at_least = scale.value.item() == 1
            bad = scale.update(torch.tensor(float(overflow)))
            torch._amp_update_scale_(expected, growth, torch.tensor(float(overflow)), 2.0, 0.5, 3)
            expected.clamp_(min=1.0)
            assert scale.value.item() == expected.item()
            assert bad.item() == (overflow and at_least), "what overflows at the least scale is not the scale's fault"


def test_overflows_lower_the_scale_and_are_no_reason_to_go_back(tmp_path: Path) -> None:
    """Of a loss as large as 1e6 in fp16: its first gradients overflow, its weights do not."""
    rt = FolderRuntime(tmp_path / "straight")
    big = dict.fromkeys(range(40), ("x", 30.0))
    settings: dict[str, Any] = {"precision": "fp16", "guard": {"steps": 2}, "steps": 40, "log_every": 1}
    expected = train_small(stream(big), rt, **settings)
    scales = [values["small/loss_scale"] for values in rt.logged.values() if "small/loss_scale" in values]
    assert scales[0] < 2**16 and all(math.log2(scale).is_integer() for scale in scales)
    assert rt.logged[40 * G]["skipped_steps"] == rt.logged[40 * G]["rollbacks"] == 0
    assert all(tensor.dtype != torch.float16 for tensor in expected.values()), "master weights"

    with pytest.raises(Interrupted):
        train_small(stream(big), FolderRuntime(tmp_path / "cut", stop_at=20 * G), **settings)
    found = train_small(stream(big), FolderRuntime(tmp_path / "cut"), **settings)
    assert all(torch.equal(expected[name], found[name]) for name in expected), "the scale is in the checkpoint"


def test_fp16_trains_as_fp32_does(tiny: TinyPipeline, tmp_path: Path) -> None:
    """Losses to fp16's precision. A few steps may be skipped at first, while the scale comes down."""
    losses = {}
    for precision in ("fp16", "fp32"):
        settings = ("samples=256", f"precision={precision}")
        rt = FolderRuntime(tmp_path / precision)
        every = "stages.prior.observe={log_every: 1, validate_every: 0}"
        train_stage(tiny.spec("prior", every, *(f"stages.prior.train.{setting}" for setting in settings)), rt)
        losses[precision] = [v["prior/loss"] for _, v in sorted(rt.logged.items()) if "prior/loss" in v][-8:]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)


class _Scalars(TorchDispatchMode):
    """The dtypes of scalars that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.half: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.ndim == 0 and x.dtype in (torch.float16, torch.bfloat16):
                self.half.append(str(function))
        return out


@pytest.mark.parametrize("products", HALVES)
@pytest.mark.parametrize("stage", ["autoencoder", "clip", "prior", "decoder", "upsampler"])
def test_losses_are_computed_in_fp32(tiny: TinyPipeline, stage: str, products: Products) -> None:
    """No mean, norm or scale of a loss is in a half precision, nor is any weight or the scale of logits."""
    adversarial = "stages.autoencoder.adversarial={start: 0, model: {width: 8, layers: 2}}"
    spec = tiny.spec(stage, *([adversarial] if stage == "autoencoder" else ()))
    module = load_stage(stage)
    cfg = module.Config.model_validate(spec.config)
    objective = build(spec)
    batch = module.data(cfg, spec.inputs).train.collate(np.arange(4), np.arange(4))
    for name in objective.active(0):
        with autocast(CPU, products), _Scalars() as scalars:
            loss, metrics = objective.loss(name, batch, Step(0, torch.Generator().manual_seed(0)))
        assert loss.dtype == torch.float32
        assert scalars.half == []
        assert all(value.dtype == torch.float32 for value in metrics.values())
        loss.backward()
        for p in objective.trainable[name].parameters():
            assert p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32)
