"""What the papers prove or define, held against dense definitions on a small network.

A tanh network 4-3-3-3-3 of random weights and data, three classes, float64. Every number
is a relative difference between what the library gives and the definition, written out
here from gradients of single examples and labels; rounding is about 1e-15.
"""

from functools import partial
from itertools import pairwise
from typing import Any, Final

import matplotlib.pyplot as plt
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn

from fisherlab.approximators import (
    KFAC,
    KPSVD,
    Deflation,
    ExactBlock,
    KFACCorrected,
    KFACTridiagonal,
    KhatriRao,
    Lanczos,
    MiniBlock,
    Power,
)
from fisherlab.layers import blocks
from fisherlab.likelihoods import Categorical
from fisherlab.numerics.linalg import factorised
from fisherlab.operators import Factored
from fisherlab.plots.style import publication
from fisherlab.reproduce.experiment import Bound, Claim, Experiment, Setting
from fisherlab.showing import number
from fisherlab.statistics import Empirical, collect, mean_gradient

WIDTHS: Final = (4, 3, 3, 3, 3)
EXAMPLES: Final = 40
FLOOR: Final = 1e-18  # of what is drawn, on a scale without zero
SHIFT: Final = 1e-4  # of central differences, whose error is its square
DAMPING: Final = 0.01
BACKPROPAGATION: Final = "gradients, beside central differences"
CHAIN_NEAR: Final = "F̂ on the block tridiagonal, beside F̃"
CHAIN_FAR: Final = "F̂⁻¹ beyond the block tridiagonal, beside 0"
CUMULANTS: Final = "F − F̃, beside joint cumulants"
ASYMMETRY: Final = "KPSVD's factors, beside their transposes"
NEGATIVE: Final = "KPSVD's factors, negative eigenvalues beside 0"
POWER: Final = "KPSVD by power iteration, beside the nearest product"
DEFLATION: Final = "DEFLATION, beside the nearest two"
LANCZOS: Final = "LANCZOS, beside the nearest two"
CORRECTED: Final = "KFAC-CORRECTED, beside KFAC and the nearest product to the rest"
MINI_BLOCKS: Final = "MBF, beside blocks of the empirical Fisher"


def statements(setting: Setting) -> xr.Dataset:
    """Return how far every statement is from being exact.

    Returns
    -------
    xarray.Dataset
        ``difference(statement)``, relative.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    net = _network(normal)
    x = normal(EXAMPLES, WIDTHS[0])
    y = torch.randint(0, WIDTHS[-1], (EXAMPLES,), generator=generator)
    found = {
        BACKPROPAGATION: _gradients(net, x, y),
        **_chain(net, x, y),
        CUMULANTS: _cumulants(net, x, y),
        **_factors(net, x, y),
        **_best(net, x, y),
        MINI_BLOCKS: _mini_blocks(net, x, y),
    }
    widths = "-".join(map(str, WIDTHS))
    told = (
        f"random data, {EXAMPLES} examples, {widths}, tanh, {WIDTHS[-1]} classes, float64; "
        f"exact Fisher; factors of the chain damped by {DAMPING:g}"
    )
    return xr.Dataset(
        {"difference": ("statement", list(found.values()))},
        {"statement": list(found)},
        {"settings": told},
    )


def _network(normal: partial[Tensor]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in pairwise(WIDTHS):
        parts += [nn.utils.skip_init(nn.Linear, before, after, dtype=torch.float64)]
        parts += [nn.Tanh()]
    net = nn.Sequential(*parts[:-1])
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(normal(*weight.shape) / weight.shape[-1] ** 0.5)
    return net


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _gradients(net: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Hold the mean gradient of all layers against central differences of the loss."""
    given = mean_gradient(net, (x, y), Categorical())
    slopes = {name: _slopes(net, name, x, y) for name, _ in net.named_parameters()}
    rows = [
        (given[name].gradient.flatten(), block.pack(slopes).flatten())
        for name, block in blocks(net).items()
    ]
    found, expected = (torch.cat(column) for column in zip(*rows, strict=True))
    return _apart(found, expected)


def _slopes(net: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    weight = net.get_parameter(name).detach()

    def loss(moved: Tensor) -> Tensor:
        output = torch.func.functional_call(net, {name: moved}, (x,))
        return nn.functional.cross_entropy(output, y)

    shifts = SHIFT * torch.eye(weight.numel(), dtype=weight.dtype)
    with torch.no_grad():
        slopes = [
            (loss(weight + shift) - loss(weight - shift)) / (2 * SHIFT)
            for shift in shifts.view(-1, *weight.shape)
        ]
    return torch.stack(slopes).view_as(weight)


def _chain(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, float]:
    """Hold F̂ against F̃ near the diagonal, and its inverse against zero elsewhere."""
    stats, damping = collect(net, (x, y), Categorical(), compress=False), Factored(DAMPING)
    pairs = KhatriRao()(stats)
    tilde, places = pairs.damped(damping).to_dense(), [*pairs.offsets.values()]
    power = KFACTridiagonal()(stats).inverse(damping).to_dense()
    hat = factorised("inv", power, "F̂⁻¹")
    near = torch.zeros_like(tilde, dtype=torch.bool)
    for i, row in enumerate(places):
        for k, column in enumerate(places):
            near[row, column] = abs(i - k) <= 1
    return {
        CHAIN_NEAR: _apart(hat[near], tilde[near]),
        CHAIN_FAR: float(power[~near].norm() / power.norm()),
    }


def _labelled(net: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p(y | x) / N, ā and g of the first layer, a row an example and label."""
    classes = WIDTHS[-1]
    logits = net[0](x).detach().requires_grad_()
    logs = nn.functional.log_softmax(net[1:](logits), -1)
    slopes = [
        torch.autograd.grad(-logs[:, c].sum(), logits, retain_graph=True)[0]
        for c in range(classes)
    ]
    weights = logs.detach().exp().T.reshape(-1) / len(x)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return weights, ones.repeat(classes, 1), torch.cat(slopes)


def _moment(weights: Tensor, *parts: Tensor) -> Tensor:
    """Return E[u ⊗ v ⊗ …], an axis a part."""
    letters = "abcd"[: len(parts)]
    terms = ",".join(f"n{letter}" for letter in letters)
    return torch.einsum(f"n,{terms}->{letters}", weights, *parts)


def _cumulants(net: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Hold F − F̃ of the first layer against κ(ā, ā′, g, g′) and those of three.

    E[āā′gg′] − E[āā′] E[gg′] = κ(ā, ā′, g, g′) + E[ā] κ(ā′, g, g′) + E[ā′] κ(ā, g, g′),
    for the mean of g is zero whatever ā is.
    """
    layer = collect(net, (x, y), Categorical(), layers=["0"])["0"]
    found = ExactBlock()(layer).to_dense() - KFAC()(layer).to_dense()
    weights, a, g = _labelled(net, x)
    mean = _moment(weights, a)
    third = _third(weights, a, g)
    gap = _fourth(weights, a, g)
    gap = gap + torch.einsum("a,bcd->abcd", mean, third)
    gap = gap + torch.einsum("b,acd->abcd", mean, third)
    expected = gap.permute(2, 0, 3, 1).reshape(found.shape)
    return _apart(found, expected)


def _third(weights: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Return κ(ā, g, g′), the third central moment."""
    centred = [part - _moment(weights, part) for part in (a, g, g)]
    return _moment(weights, *centred)


def _fourth(weights: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Return κ(ā, ā′, g, g′): the fourth central moment less the pairs of second ones."""
    a, g = (part - _moment(weights, part) for part in (a, g))
    aa, ag, gg = (_moment(weights, *pair) for pair in ((a, a), (a, g), (g, g)))
    pairs = torch.einsum("ab,cd->abcd", aa, gg)
    pairs = pairs + torch.einsum("ac,bd->abcd", ag, ag)
    pairs = pairs + torch.einsum("ad,bc->abcd", ag, ag)
    return _moment(weights, a, a, g, g) - pairs


def _factors(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, float]:
    """Say how far KPSVD's factors are from symmetric and from positive semi-definite."""
    stats = collect(net, (x, y), Categorical())
    products: list[Any] = [KPSVD()(stats[name]) for name in stats]
    factors = [one for product in products for one in product.terms[0]]
    spectra = [factorised("eigvalsh", (one + one.T) / 2, "a factor") for one in factors]
    return {
        ASYMMETRY: max(_apart(one.T, one) for one in factors),
        NEGATIVE: max(max(0.0, float(-one.min() / one.max())) for one in spectra),
    }


def _best(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, float]:
    """Hold the errors of Kronecker sums against those of singular values.

    Entry ((o, o′), (i, i′)) of the rearranged F is F's at ((o, i), (o′, i′)); the error of
    the nearest k products is the norm of its singular values after the first k.
    """
    layer = collect(net, (x, y), Categorical(), layers=["0"])["0"]
    exact, kfac = ExactBlock()(layer).to_dense(), KFAC()(layer).to_dense()
    sums: dict[str, tuple[Any, Tensor, int]] = {
        POWER: (KPSVD(1, Power()), exact, 1),
        DEFLATION: (Deflation(2, Power()), exact, 2),
        LANCZOS: (KPSVD(2, Lanczos()), exact, 2),
        CORRECTED: (KFACCorrected(solver=Power()), exact - kfac, 1),
    }
    found = {}
    for name, (method, rest, kept) in sums.items():
        left = _rearranged(rest, layer.weight_shape)[kept:].norm()
        error = (exact - method(layer).to_dense()).norm()
        found[name] = float(abs(error - left) / exact.norm())
    return found


def _rearranged(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the singular values of a matrix rearranged for Kronecker products."""
    rows, columns = shape
    parts = matrix.view(rows, columns, rows, columns).transpose(1, 2)
    return factorised("svdvals", parts.reshape(rows**2, columns**2), "F rearranged")


def _mini_blocks(net: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Hold MBF of the first layer against blocks of Σ vec(g āᵀ) vec(g āᵀ)ᵀ / N."""
    layer = collect(net, (x, y), Categorical(), Empirical(), layers=["0"])["0"]
    found = MiniBlock()(layer).to_dense()
    _, a, g = _labelled(net, x)
    chosen = y * len(x) + torch.arange(len(x))  # the rows of the labels of the data
    rows = (g[chosen][:, :, None] * a[chosen][:, None, :]).flatten(1)
    inside = torch.block_diag(*[torch.ones(a.shape[1], a.shape[1])] * g.shape[1])
    return _apart(found, rows.T @ rows / len(x) * inside)


def exactly(statement: str, *names: str, most: float = 1e-9) -> Claim:
    """Claim that statements of `statements` hold to rounding."""

    def measure(ds: xr.Dataset) -> dict[str, float]:
        return {name: float(ds["difference"].sel(statement=name)) for name in names}

    def reason(ds: xr.Dataset) -> str:
        said = [f"{n} {number(d)}" for n, d in measure(ds).items() if not d <= most]
        others = int((ds["difference"] <= most).sum())
        return (
            f"Above {most:g} are {'; '.join(said)}; {others} of the "
            f"{ds.sizes['statement']} statements on this network are below."
        )

    how = "relative differences; rounding is about 1e-15"
    bounds = dict.fromkeys(names, Bound(at_most=most))
    return Claim(statement, bounds, measure, how, reason=reason)


def draw(result: xr.Dataset) -> Drawing:
    """Draw the differences, all seeds; what is exact lies at rounding."""
    shown = result["difference"].clip(min=FLOOR)
    rows = shown.to_dataframe().reset_index()
    with publication():
        figure, ax = plt.subplots(figsize=(7.0, 2.8), layout="constrained")
        ax.plot(rows["difference"], rows["statement"], "o")
        ax.invert_yaxis()
        ax.set(xscale="log", xlim=(FLOOR / 2, 1.0))
        ax.set_xlabel(f"relative difference; {FLOOR:g} and below at the left edge")
    return figure


EXPERIMENTS: Final = (
    Experiment(
        "exact-statements",
        "Algorithms, a lemma and a proposition of the papers beside dense definitions",
        statements,
        draw,
        data=(),
        minutes=(0.1, 0.1),
    ),
)
