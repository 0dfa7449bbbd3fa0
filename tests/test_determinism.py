"""Two runs are compared where that is asked, and the layer that differs is named."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from tests.model_zoo import (
    NETWORKS,
    randomised,
    rows,
)
from tests.zoo_modules import (
    Noisy,
)


class Perturbed(nn.Module):
    """Add noise too small to be seen in the output of two examples."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size, self.generator = size, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return x + self.size * noise


def network(noise: float, at: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)]
    layers.insert(at, Perturbed(noise))
    return randomised(nn.Sequential(*layers))


@pytest.mark.parametrize(("at", "name"), [(0, "1"), (2, "3"), (3, "4")])
@pytest.mark.parametrize("noise", [1e-9, 1.0])
def test_the_layer_behind_the_noise_is_named(noise: float, at: int, name: str) -> None:
    model = network(noise, at)
    with pytest.raises(fl.NumericalError, match=f"of layer '{name}' by"):
        fl.collect(model, (rows(6, 3), None), fl.Gaussian(), check_deterministic=True)


def test_noise_too_small_for_the_probe_passes_without_the_check() -> None:
    data = (rows(6, 3), None)
    assert len(fl.collect(network(1e-10, 2), data, fl.Gaussian())) == 3


def test_per_example_blocks_are_checked_too() -> None:
    model = randomised(nn.Sequential(nn.LayerNorm(3), Perturbed(1e-9), nn.Tanh()))
    with pytest.raises(fl.NumericalError, match="the gradient of layer '0'"):
        fl.collect(model, (rows(6, 3), None), fl.Gaussian(), check_deterministic=True)


@pytest.mark.parametrize("name", ["mlp", "vit", "lstm"])
def test_deterministic_models_pass_unchanged(name: str) -> None:
    case = NETWORKS[name]()
    data: Any = iter([(case.x, case.y), (case.x, case.y), (case.x, case.y)])
    checked = fl.collect(case.model, data, case.likelihood, check_deterministic=True)
    plain = fl.collect(case.model, [(case.x, case.y)] * 3, case.likelihood)
    for block, layer in plain.items():
        assert checked[block].count == layer.count
        a, b = (fl.ExactBlock()(s[block]).to_dense() for s in (checked, plain))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_random_models_are_refused_without_the_check_too() -> None:
    with pytest.raises(fl.UnsupportedModelError, match="from call to call"):
        fl.collect(randomised(Noisy(0.1)), (rows(5, 3), None), fl.Gaussian())


class NoisyFarOut(Perturbed):
    """Add noise to inputs far from 0 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 50, super().forward(x), x)


def test_noise_that_begins_in_the_second_batch_is_found() -> None:
    model = randomised(nn.Sequential(NoisyFarOut(1.0), nn.Linear(3, 2)))
    x = rows(6, 3)
    near, far = (x, None), (x + 100, None)
    with pytest.raises(fl.NumericalError, match="of layer '1' by"):
        fl.collect(model, [near, far], fl.Gaussian(), check_deterministic=True)
