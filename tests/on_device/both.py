"""The same work on the host and on the device, and whether it came to the same."""

import dataclasses

import numpy as np
import torch
import xarray as xr
from torch import nn

import fisherlab as fl
from tests import cases

LIKELIHOOD = fl.Categorical()
ROUNDING = 1e-8  # a card sums in another order
CLOCKS = ("seconds", "cost_value")  # differ from run to run
ROOTS = {"error", "kronecker_value", "singular_value"}  # of what is zero but for rounding


def network(*, seed=0, norm=False):
    """A small classifier of points."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
        if norm:
            layers.insert(1, nn.LayerNorm(4))
        return nn.Sequential(*layers).double()


def data(examples=12):
    x = cases.normal(examples, 5, seed=1)
    return x, torch.arange(examples) % 3


def on_both(work, device, **options):
    """Do `work(model, x, y)` on the host and on the device."""
    x, y = data()
    host = work(network(**options), x, y)
    return host, work(network(**options).to(device), x.to(device), y.to(device))


def assert_same(host, here):
    """Compare what two devices made, down to the numbers."""
    if isinstance(host, torch.Tensor):
        torch.testing.assert_close(here.cpu(), host, rtol=ROUNDING, atol=1e-11)
    elif isinstance(host, xr.DataTree):
        for a, b in zip(host.subtree, here.subtree, strict=True):
            assert_same(a.to_dataset(), b.to_dataset())
    elif isinstance(host, xr.Dataset):
        assert list(host.variables) == list(here.variables)
        for name, values in host.variables.items():
            if any(clock in name for clock in CLOCKS):
                continue
            if values.dtype.kind == "f":
                least = 1e-7 if name in ROOTS else 1e-9
                np.testing.assert_allclose(
                    here[name], values, ROUNDING, least, err_msg=name
                )
            else:
                np.testing.assert_array_equal(here[name], values, err_msg=name)
    elif isinstance(host, dict):
        assert list(host) == list(here)
        for name, value in host.items():
            assert_same(value, here[name])
    elif hasattr(host, "to_dense"):
        assert_same(host.to_dense(), here.to_dense())
    elif dataclasses.is_dataclass(host):
        assert_same(vars(host), vars(here))
    elif isinstance(host, float):
        assert here == pytest_approx(host)
    else:
        assert here == host


def pytest_approx(value):
    import pytest

    return pytest.approx(value, rel=ROUNDING, abs=1e-11, nan_ok=True)
