"""The running average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genpipe.training.ema import Ema, gamma_of


def linear(value: float) -> nn.Linear:
    module = nn.Linear(2, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


def set_to(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_closed_form(decay: float) -> None:
    """shadow_n = sum over k of w_k (1 - d_k) times the later decays, plus w_0 times all of them."""
    values = [1.0, -2.0, 0.5, 4.0, 3.0, -1.0]
    decays = [min(decay, (1 + k) / (10 + k)) for k in range(len(values) - 1)]
    module = linear(values[0])
    ema = Ema(module, decay=decay)
    for value in values[1:]:
        set_to(module, value)
        ema.update()
    expected = values[0] * torch.tensor(decays, dtype=torch.float64).prod()
    for k, value in enumerate(values[1:]):
        expected += value * (1 - decays[k]) * torch.tensor(decays[k + 1 :], dtype=torch.float64).prod()
    for shadow in ema.shadow.values():
        torch.testing.assert_close(shadow, torch.full_like(shadow, expected.item()))


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_width_of_a_power_function_average(sigma_rel: float) -> None:
    """Averaging the number of the step gives the profile's mean, and of its square the second moment."""
    steps, moments = 4000, []
    for power in (1, 2):
        module = linear(-1.0)  # where it began counts for nothing
        ema = Ema(module, decay=0.5, sigma_rel=sigma_rel)
        for step in range(1, steps + 1):
            set_to(module, (step / steps) ** power)
            ema.update()
        moments.append(ema.shadow["weight"].mean().item())
    mean, square = moments
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=2e-3)
    gamma = gamma_of(sigma_rel)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3), "of s^gamma over [0, 1]"


def test_published_widths() -> None:
    """Karras et al. 2024, section 3.1: 0.05 is gamma 16.97, 0.10 is 6.94."""
    assert [gamma_of(0.05), gamma_of(0.10)] == pytest.approx([16.97, 6.94], abs=0.005)


def test_swapping_gives_the_average_and_gives_the_weights_back() -> None:
    module = linear(1.0)
    ema = Ema(module, decay=0.999)
    set_to(module, 2.0)
    ema.update()  # the first decay is 1 / 10
    with ema.swapped():
        torch.testing.assert_close(module.weight, torch.full_like(module.weight, 1.9))
    assert (module.weight == 2.0).all()
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        raise RuntimeError("inside")
    assert (module.weight == 2.0).all(), "an error in validation does not lose the weights"
    ema.swap()
    torch.testing.assert_close(module.weight, torch.full_like(module.weight, 1.9))


def test_an_average_in_host_memory_has_the_same_bits() -> None:
    module = nn.Linear(5, 3)
    there, away = Ema(module, decay=0.9), Ema(module, decay=0.9, offloaded=True)
    for _ in range(5):
        with torch.no_grad():
            module.weight.normal_()
        there.update()
        away.update()
    one, other = there.state_dict(), away.gathered(keep=True)
    assert all(torch.equal(one[name], other[name]) for name in other) and away.gathered(keep=False) == {}
    with there.swapped():
        averaged = module.weight.clone()
    with away.swapped():
        assert torch.equal(module.weight, averaged)


def test_a_restored_average_goes_on_as_the_first_would() -> None:
    module = linear(0.0)
    first = Ema(module, decay=0.9)
    for value in (1.0, 2.0, 3.0):
        set_to(module, value)
        first.update()
    second = Ema(module, decay=0.9)
    second.load_state_dict(first.state_dict())
    set_to(module, 4.0)
    first.update()
    second.update()
    assert second.updates == 4
    for name, shadow in first.shadow.items():
        assert torch.equal(shadow, second.shadow[name])
