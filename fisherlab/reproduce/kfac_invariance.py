r"""K-FAC's Theorem 1 as an experiment: steps that do not depend on the parametrisation.

A network and its copy under invertible affine maps compute the same function: the input is
multiplied by Ω and the first pre-activation by Φ, and the weights undo both. A method that
is invariant moves both through the same functions. K-FAC's undamped inverse does; the
controls are the methods that share its Kronecker form and damping.

Reference: Martens & Grosse 2015, arXiv 1503.05671, Theorem 1 and Corollary 3 (section 10).
"""

import copy
from functools import partial
from typing import Any, Final

import matplotlib.pyplot as plt
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn

from fisherlab.approximators import (
    EKFAC,
    KFAC,
    KPSVD,
    TKFAC,
    Diagonal,
    ExactBlock,
    MiniBlock,
)
from fisherlab.layers import blocks
from fisherlab.likelihoods import Gaussian
from fisherlab.numerics.linalg import factorised
from fisherlab.plots.style import publication
from fisherlab.reproduce.experiment import CONTROL, Bound, Claim, Experiment, Setting
from fisherlab.showing import number
from fisherlab.statistics import collect, mean_gradient

INPUTS, HIDDEN, OUTPUTS, EXAMPLES = 5, 6, 3, 400
STEPS, RATE = 3, 0.05
METHODS: Final[dict[str, tuple[Any, float]]] = {  # λ; the exact block is singular at 0
    "kfac": (KFAC(), 0.0),
    "exact, λ = 1e-10": (ExactBlock(), 1e-10),
    "mini-block": (MiniBlock(), 0.0),
    "kpsvd": (KPSVD(), 0.0),
    "tkfac": (TKFAC(), 0.0),
    "ekfac": (EKFAC(), 0.0),
    "diagonal": (Diagonal(), 0.0),
    "kfac, λ = 0.01": (KFAC(), 1e-2),
}


class Transformed(nn.Module):
    """Linear, tanh, linear, with Ω before the first layer and Φ behind it."""

    before: Tensor
    behind: Tensor

    def __init__(self, before: Tensor, behind: Tensor) -> None:
        super().__init__()
        self.first = nn.utils.skip_init(nn.Linear, INPUTS, HIDDEN, dtype=torch.float64)
        self.second = nn.utils.skip_init(nn.Linear, HIDDEN, OUTPUTS, dtype=torch.float64)
        self.register_buffer("before", before)
        self.register_buffer("behind", behind)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        hidden = self.first(x @ self.before.T) @ self.behind.T
        return self.second(torch.tanh(hidden))


def pair(generator: torch.Generator) -> tuple[Transformed, Transformed]:
    """Draw a network and a transformed one of the same function."""
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    plain = Transformed(torch.eye(INPUTS).double(), torch.eye(HIDDEN).double())
    other = Transformed(normal(INPUTS, INPUTS), normal(HIDDEN, HIDDEN))
    with torch.no_grad():
        for weight in plain.parameters():
            weight.copy_(normal(*weight.shape) / max(weight.shape[-1], 1) ** 0.5)
        other.second.load_state_dict(plain.second.state_dict())
        undo = factorised("inv", other.behind, "the map behind")
        ahead = factorised("inv", other.before, "the map before")
        other.first.weight.copy_(undo @ plain.first.weight @ ahead)
        other.first.bias.copy_(undo @ plain.first.bias)
    return plain, other


def invariance(setting: Setting) -> xr.Dataset:
    """Return how far both networks are apart after some steps of each method.

    Returns
    -------
    xarray.Dataset
        ``difference(approximator)`` of the outputs: ‖f_a − f_b‖ over ‖f_a − f_0‖.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    plain, other = pair(generator)
    x = torch.randn(EXAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    y = torch.randn(EXAMPLES, OUTPUTS, generator=generator, dtype=torch.float64)
    begun = plain(x).detach()
    found = []
    for method, damping in METHODS.values():
        a, b = copy.deepcopy(plain), copy.deepcopy(other)
        for _ in range(STEPS):
            for net in (a, b):
                _step(net, (x, y), method, damping)
        apart = (a(x) - b(x)).norm() / (a(x) - begun).norm()
        found.append(float(apart.detach()))
    told = (
        f"random data, {EXAMPLES} examples, {INPUTS}-{HIDDEN}-{OUTPUTS}, tanh, Gaussian, "
        f"float64; {STEPS} steps of {RATE:g}, exact Fisher; Ω and Φ normal"
    )
    return xr.Dataset(
        {"difference": ("approximator", found)},
        {"approximator": list(METHODS)},
        {"settings": told},
    )


def _step(net: nn.Module, data: tuple[Tensor, Tensor], method: Any, damping: float) -> None:
    stats = collect(net, data, Gaussian())
    gradient = mean_gradient(net, data, Gaussian())
    parameters = dict(net.named_parameters())
    for name, block in blocks(net).items():
        change = method(stats[name]).solve(gradient[name].gradient, damping=damping)
        with torch.no_grad():
            for key, part in block.unpack(change).items():
                parameters[key].sub_(RATE * part)


def draw(result: xr.Dataset) -> Drawing:
    """Draw the differences, all seeds; invariant methods are at rounding."""
    rows = result["difference"].to_dataframe().reset_index()
    with publication():
        figure, ax = plt.subplots(figsize=(6.0, 3.0), layout="constrained")
        ax.plot(rows["difference"], rows["approximator"], "o")
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlabel("‖f_a − f_b‖ / ‖f_a − f_0‖")
    return figure


def _of_kfac(ds: xr.Dataset) -> dict[str, float]:
    return {"difference": float(ds["difference"].sel(approximator="kfac"))}


def _others(ds: xr.Dataset) -> dict[str, float]:
    found = ds["difference"]
    names = ("kpsvd", "tkfac", "diagonal", "kfac, λ = 0.01")
    return {"smallest": min(float(found.sel(approximator=name)) for name in names)}


def _differences(ds: xr.Dataset) -> str:
    """Say how far every method is from invariance."""
    said = [f"{v['approximator'].item()} {number(float(v))}" for v in ds["difference"]]
    return f"Differences of the outputs over their change: {'; '.join(said)}."


CLAIMS: Final = (
    Claim(
        "Undamped K-FAC moves both networks through the same functions.",
        {"difference": Bound(at_most=1e-9)},
        _of_kfac,
        "of the outputs, over their change; rounding is about 1e-13",
        reason=_differences,
    ),
    Claim(
        "Damped K-FAC, KPSVD, TKFAC and the diagonal do not.",
        {"smallest": Bound(at_least=1e-3)},
        _others,
        "the experiment can tell",
        basis=CONTROL,
        reason=_differences,
    ),
)

EXPERIMENTS: Final = (
    Experiment(
        "kfac-invariance",
        "K-FAC (1503.05671) Theorem 1: invariance to affine maps, beside other methods",
        invariance,
        draw,
        data=(),
        minutes=(0.1, 0.1),
    ),
)
