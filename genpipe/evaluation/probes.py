"""Linear classifiers on features: how much of a class is there to be learned from a set of pictures.

N pictures to learn from, M to be tested on, D features, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genpipe.models.precision import fp32

MAX_ITERATIONS = 500


def linear_accuracy(learned: Tensor, labels: Tensor, tested: Tensor, expected: Tensor, *, l2: float) -> float:
    """The share of tested pictures [M, D] whose classes, int64 [M], a classifier tells that learned from others.

    Multinomial logistic regression on features [N, D] with labels int64 [N], standardized by their mean and deviation,
    in fp64 and to its optimum: mean cross entropy + l2 / 2 times the squared weights, without the biases.
    """
    mean, std = learned.double().mean(0), learned.double().std(0, correction=0)
    x, y = ((of.double() - mean) / std.clamp(min=1e-6) for of in (learned, tested))
    classes = int(max(labels.max(), expected.max())) + 1
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad(), fp32(x.device):
        optimizer.step(loss)
    with torch.no_grad():
        return float(((y @ weight + bias).argmax(1) == expected).double().mean())
