"""What validations share, by hand."""

from __future__ import annotations

import pytest
import torch

from genpipe.evaluation.validation import cosine, mean_losses, unrelated


def test_cosine_and_its_baseline() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert cosine(rows, rows).tolist() == pytest.approx([1, 1, 1])
    assert cosine(rows, unrelated(rows)).tolist() == pytest.approx([-1, 0, 0])
    many = torch.arange(50)
    assert (unrelated(many) != many).all() and sorted(unrelated(many).tolist()) == many.tolist()


def test_means_are_over_samples_and_not_over_batches() -> None:
    batches = [{"loss": torch.tensor([1.0, 2.0, 3.0])}, {"loss": torch.tensor([10.0])}]
    assert mean_losses(batches) == {"loss": 4.0}
