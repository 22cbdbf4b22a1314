"""Contrastive losses in closed form, on ranks against one process, and in the memory that they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from ranks import run_ranks
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from genpipe.models.contrastive import (
    LossConfig,
    SigmoidLoss,
    SoftmaxLoss,
    encode_in_chunks,
    sigmoid_loss,
    sigmoid_loss_in_chunks,
    softmax_loss,
    softmax_loss_in_chunks,
)

RANKS = 2
PAIRS = 64


def pair_loss(kind: str, image_embed: Tensor, text_embed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if kind == "softmax":
        return softmax_loss(image_embed, text_embed, logit_scale=scale)
    return sigmoid_loss(image_embed, text_embed, logit_scale=scale, logit_bias=bias)


def test_softmax_loss_of_orthogonal_pairs_has_a_closed_form() -> None:
    eye = torch.eye(4)
    scale = torch.tensor(math.log(3.0))
    expected = math.log(math.exp(3.0) + 3.0) - 3.0
    assert softmax_loss(eye, eye, logit_scale=scale).item() == pytest.approx(expected, rel=1e-5)


def test_sigmoid_loss_of_orthogonal_pairs_has_a_closed_form() -> None:
    """Each image has one text with logit 3 - 1 and three with logit -1, to be told apart: eq. 1 by hand."""
    eye = torch.eye(4)
    loss = sigmoid_loss(eye, eye, logit_scale=torch.tensor(math.log(3.0)), logit_bias=torch.tensor(-1.0))
    expected = math.log1p(math.exp(-2.0)) + 3 * math.log1p(math.exp(-1.0))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [1, 4, 9, 100])
def test_losses_in_chunks_are_those_of_the_whole(size: int) -> None:
    """Against cross-entropy over all logits, and the paper's pairwise terms, in double precision."""
    images, texts = F.normalize(torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(2)), dim=-1)
    scale, bias = torch.tensor(math.log(10.0)), torch.tensor(-3.0)
    logits = 10.0 * images.double() @ texts.double().T
    own = torch.arange(9)
    softmax = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    assert softmax_loss_in_chunks(images, texts, logit_scale=scale, size=size).item() == pytest.approx(softmax.item())
    sigmoid = -F.logsigmoid((2 * torch.eye(9) - 1) * (logits - 3.0)).sum() / 9
    found = sigmoid_loss_in_chunks(images, texts, logit_scale=scale, logit_bias=bias, size=size)
    assert found.item() == pytest.approx(sigmoid.item(), rel=1e-5)


def test_sigmoid_loss_is_the_papers_pseudocode() -> None:
    """Zhai et al. 2023, algorithm 1."""
    image_embed, text_embed = F.normalize(torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale, bias = torch.tensor(math.log(10.0)), torch.tensor(-10.0)
    logits = image_embed @ text_embed.T * scale.exp() + bias
    labels = 2 * torch.eye(9) - torch.ones(9, 9)
    expected = -F.logsigmoid(labels * logits).sum() / 9
    found = sigmoid_loss(image_embed, text_embed, logit_scale=scale, logit_bias=bias)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_are_in_fp32_under_autocast(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image_embed, text_embed = F.normalize(torch.randn(2, 6, 4, generator=generator), dim=-1)
    scale, bias = torch.tensor(1.5), torch.tensor(-2.0)
    exact = pair_loss(kind, image_embed, text_embed, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = pair_loss(kind, image_embed, text_embed, scale, bias)
    assert under.dtype == torch.float32 and torch.equal(under, exact)


def test_settings_of_the_losses() -> None:
    parse = TypeAdapter(LossConfig).validate_python
    assert parse({}) == SoftmaxLoss() and parse({"kind": "sigmoid"}) == SigmoidLoss(kind="sigmoid")
    with pytest.raises(ValidationError, match="bias"):
        parse({"kind": "softmax", "bias": -10})


def problem() -> tuple[Tensor, ...]:
    """Images, texts and the weights of two linear towers."""
    gen = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, PAIRS, 5, generator=gen)
    image_weight, text_weight = torch.randn(2, 5, 4, generator=gen)
    return images, texts, image_weight, text_weight


def gradients(kind: str, images: Tensor, texts: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The loss, and its gradients in the weights, the scale and the bias."""
    leaves = [w.clone().requires_grad_() for w in (*weights, torch.tensor(1.5), torch.tensor(-2.0))]
    image_embed, text_embed = F.normalize(images @ leaves[0], dim=1), F.normalize(texts @ leaves[1], dim=1)
    loss = pair_loss(kind, image_embed, text_embed, leaves[2], leaves[3])
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which was made inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def run_rank(rank: int, folder: str) -> None:
    import_module("torch._dynamo")  # as checkpoints do: later it keeps the group alive, which aborts at exit then
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    images, texts, *weights = problem()
    share = PAIRS // RANKS
    mine = slice(share * rank, share * (rank + 1))
    record: dict[str, Any] = {}
    for kind in ("softmax", "sigmoid"):
        with Largest() as largest:
            values = gradients(kind, images[mine], texts[mine], weights)
        for value in values:
            dist.all_reduce(value)
            value /= RANKS
        record[kind] = {"values": values, "largest": largest.elements}
    torch.save(record, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, str(folder), ranks=RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


@pytest.mark.services
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_ranks_equal_one_process_in_loss_and_gradients(ranks: list[dict[str, Any]], kind: str) -> None:
    images, texts, *weights = problem()
    alone = gradients(kind, images, texts, weights)
    assert len(alone) == (4 if kind == "softmax" else 5) and all(value.abs().max() > 1e-3 for value in alone)
    for record in ranks:
        for value, expected in zip(record[kind]["values"], alone, strict=True):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.services
def test_logits_of_a_rank_are_a_share_of_all(ranks: list[dict[str, Any]]) -> None:
    """b B for the softmax, b b for the sigmoid, where one process alone has B B."""
    share = PAIRS // RANKS
    with Largest() as alone:
        gradients("softmax", *problem()[:2], list(problem()[2:]))
    assert alone.elements == PAIRS * PAIRS
    assert {record["softmax"]["largest"] for record in ranks} == {share * PAIRS}
    assert {record["sigmoid"]["largest"] for record in ranks} == {share * share}


def saved_elements(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `run` returns, and how many numbers it kept for backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        return run(), sum(kept.values())


@pytest.mark.parametrize("size", [1, 3, 5])
def test_chunks_give_the_gradients_of_the_whole_and_keep_less(size: int) -> None:
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU())
    images, texts = torch.randn(2, 10, 6)

    def embed(rows: Tensor) -> Tensor:
        return F.normalize(tower(rows), dim=-1)

    results = []
    for chunk in (None, size):
        tower.zero_grad()
        embeds, kept = saved_elements(
            lambda chunk=chunk: torch.stack([encode_in_chunks(embed, rows, size=chunk) for rows in (images, texts)])
        )
        loss = softmax_loss(embeds[0], embeds[1], logit_scale=torch.tensor(2.0))
        loss.backward()
        results.append(([loss.detach(), *(p.grad.clone() for p in tower.parameters() if p.grad is not None)], kept))
    (whole, kept_whole), (chunked, kept_chunked) = results
    assert len(whole) == 5
    for value, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert kept_chunked < kept_whole / 10
