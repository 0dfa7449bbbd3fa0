"""Where the papers' conclusions change: over the damping, the examples and the depth.

Networks 256-20-…-20-10 (tanh) of several depths are trained alike on digits. Of each the
layers 20 → 20 are looked at, with the exact Fisher of few and of many examples and with λ
from a small to a large part of the mean eigenvalue. A conclusion is a number beside the
line that it must not cross, a figure a paper. That of CG-FAC is `cg-fac-cost`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import seaborn as sns
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.analysis import RelativeDamping, sweep
from fisherlab.approximators import (
    KFAC,
    KPSVD,
    Approximator,
    Diagonal,
    KhatriRao,
    MiniBlock,
)
from fisherlab.approximators.network import ExactNetwork
from fisherlab.numerics.linalg import factorised
from fisherlab.operators import Factored, KroneckerBlocks
from fisherlab.plots.style import publication
from fisherlab.problems.networks import perceptron
from fisherlab.problems.problem import Problem, drawn
from fisherlab.reproduce.experiment import CONTROL, Bound, Claim, Experiment, Row, Setting
from fisherlab.reproduce.kfac_matrices import block_diagonal, chain_inverse
from fisherlab.reproduce.mini_block_fisher import train
from fisherlab.showing import percent
from fisherlab.statistics import Statistics, collect, mean_gradient

DEPTHS: Final = ((4, 6), (4, 6, 9))  # layers of weights: quick, and the full size
EXAMPLES: Final = ((100, 1_000), (50, 200, 1_400))
ALPHAS: Final = ((1e-4, 1e-2, 1.0), (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0))
EPOCHS: Final = (15, 50)
Gradients = Mapping[str, Any]
Measure = Callable[[Statistics, Gradients, tuple[float, ...]], xr.DataArray]


def mapped(measure: Measure, setting: Setting) -> xr.Dataset:
    """Measure at every depth, number of examples and damping.

    Returns
    -------
    xarray.Dataset
        ``value(depth, examples, conclusion, damping)``, with λ over the mean eigenvalue.
    """
    full = not setting.quick
    rows = []
    for depth in DEPTHS[full]:
        problem = _trained(depth, setting)
        cells = [_cell(problem, n, measure, setting) for n in EXAMPLES[full]]
        rows.append(xr.concat(cells, xr.Variable("examples", list(EXAMPLES[full]))))
    value = xr.concat(rows, xr.Variable("depth", list(DEPTHS[full])))
    told = (
        f"digits (scikit-learn), 256-20-…-20-10, tanh, float64; {EPOCHS[full]} epochs of "
        "SGD 0.01, momentum 0.9, batch 64; exact Fisher of the layers 20 → 20"
    )
    return xr.Dataset({"value": value}, attrs={"settings": told})


def _trained(depth: int, setting: Setting) -> Problem:
    widths = (256, *[20] * (depth - 1), 10)
    problem = replace(
        setting.load("digits"), model=perceptron(widths, "tanh", seed=setting.seed)
    )
    problem.model.to(setting.device)
    steps = EPOCHS[not setting.quick] * (len(problem.train[0]) // 64)
    train(problem, setting.seed, steps)
    return problem


def _cell(
    problem: Problem, examples: int, measure: Measure, setting: Setting
) -> xr.DataArray:
    data = drawn(problem.train, examples, setting.seed)
    names = [n for n, m in problem.model.named_modules() if isinstance(m, torch.nn.Linear)]
    model, likelihood = problem.model, problem.likelihood
    stats = collect(model, data, likelihood, layers=names[1:-1], compress=False)
    gradients = mean_gradient(model, data, likelihood)
    own = {name: gradients[name] for name in stats}
    return measure(stats, own, ALPHAS[not setting.quick])


def chain_over_blocks(
    stats: Statistics, gradients: Gradients, alphas: tuple[float, ...]
) -> xr.DataArray:
    """Return how near the two inverses of K-FAC, factors damped, are to (F + λI)⁻¹."""
    exact, pairs = ExactNetwork()(stats).to_dense(), KhatriRao()(stats)
    assert isinstance(pairs, KroneckerBlocks)
    places, rows = list(pairs.offsets.values()), len(exact)
    values = []
    for alpha in alphas:
        damping = alpha * float(exact.trace()) / rows
        wanted = factorised("inv", exact + damping * torch.eye(rows).to(exact), "F")
        tilde = pairs.damped(Factored(damping)).to_dense()
        blocks = factorised("inv", block_diagonal(tilde, places), "F̆")
        chain = chain_inverse(tilde, places)
        errors = [float((one - wanted).norm() / wanted.norm()) for one in (chain, blocks)]
        values.append([errors[0] / errors[1], errors[0]])
    names = ["error of F̂⁻¹ / F̆⁻¹", "error of F̂⁻¹"]
    coords = {"damping": list(alphas), "conclusion": names}
    return xr.DataArray(values, coords, ["damping", "conclusion"])


def _swept(
    stats: Statistics,
    gradients: Gradients,
    alphas: tuple[float, ...],
    methods: Mapping[str, Approximator],
) -> xr.Dataset:
    metrics = ["inverse_error", "direction_cosine"]
    damping = RelativeDamping(alphas)
    found = sweep(stats, methods, damping=damping, gradient=gradients, metrics=metrics)
    return found[metrics].mean("layer", skipna=False)


def _named(values: Mapping[str, xr.DataArray]) -> xr.DataArray:
    return xr.concat(list(values.values()), xr.Variable("conclusion", list(values)))


def one_term(
    stats: Statistics, gradients: Gradients, alphas: tuple[float, ...]
) -> xr.DataArray:
    """Return what KPSVD's nearness to F is worth in its inverse and in its step."""
    methods: dict[str, Approximator] = {"kpsvd": KPSVD(), "kfac": KFAC()}
    found = _swept(stats, gradients, alphas, methods)
    kpsvd, kfac = (found.sel(approximator=n, drop=True) for n in ("kpsvd", "kfac"))
    return _named(
        {
            "inverse error, KPSVD / KFAC": kpsvd.inverse_error / kfac.inverse_error,
            "1 − cosine, KPSVD / KFAC": (1 - kpsvd.direction_cosine)
            / (1 - kfac.direction_cosine),
        }
    )


def mini_blocks(
    stats: Statistics, gradients: Gradients, alphas: tuple[float, ...]
) -> xr.DataArray:
    """Return where mini-blocks stand between the diagonal and KFAC, by their step."""
    methods: dict[str, Approximator] = {
        "mbf": MiniBlock(),
        "diagonal": Diagonal(),
        "kfac": KFAC(),
    }
    missed = 1 - _swept(stats, gradients, alphas, methods)["direction_cosine"]
    mbf, diagonal, kfac = (missed.sel(approximator=n, drop=True) for n in methods)
    return _named(
        {
            "1 − cosine, MBF / diagonal": mbf / diagonal,
            "1 − cosine, KFAC / MBF": kfac / mbf,
        }
    )


def draw(result: xr.Dataset) -> Drawing:
    """Draw every conclusion over λ, a column a depth; it changes at the dashed line."""
    rows = result["value"].rename(depth="layers").to_dataframe().reset_index()
    with publication():
        grid = sns.relplot(
            rows,
            kind="line",
            x="damping",
            y="value",
            hue="examples",
            style="examples",
            markers=True,
            palette="viridis",
            hue_norm=None,
            row="conclusion",
            col="layers",
            errorbar=("pi", 100),
            facet_kws={"sharey": "row"},
            height=2.5,
            aspect=1.2,
        )
        grid.set(xscale="log")
        grid.refline(y=1.0)
        grid.set_titles("")
        grid.set_xlabels("λ / mean eigenvalue")
        for ax, depth in zip(grid.axes[0], grid.col_names, strict=True):
            ax.set_title(f"{depth} layers")
        for ax, name in zip(grid.axes[:, 0], grid.row_names, strict=True):
            ax.set_ylabel(str(name).replace(", ", ",\n"))
    return grid.figure


def _experiment(
    name: str, said: str, measure: Measure, minutes: tuple[float, float]
) -> Experiment:
    text = f"Map of validity, {said}, over damping, examples and depth"
    return Experiment(name, text, partial(mapped, measure), draw, minutes=minutes)


EXPERIMENTS: Final = (
    _experiment("validity-kfac", "K-FAC: its two inverses", chain_over_blocks, (0.4, 15.0)),
    _experiment("validity-kpsvd", "KPSVD: inverse and step", one_term, (0.2, 3.0)),
    _experiment("validity-mbf", "MBF: its step", mini_blocks, (0.2, 3.0)),
)


def _worst(conclusion: str) -> Callable[[xr.Dataset], Mapping[str, float]]:
    return lambda ds: {"largest": float(ds["value"].sel(conclusion=conclusion).max())}


def _where(conclusion: str) -> Callable[[xr.Dataset], str]:
    """Say in how much of the map a conclusion holds, and along every axis of it."""

    def said(ds: xr.Dataset) -> str:
        holds = ds["value"].sel(conclusion=conclusion) <= 1.0
        axes = {"damping": "λ / mean eigenvalue", "examples": "examples", "depth": "layers"}
        parts = []
        for axis, name in axes.items():
            rest = [other for other in axes if other != axis]
            shares = holds.mean(rest)
            told = ", ".join(
                f"{percent(float(share))} at {share[axis].item():g}" for share in shares
            )
            parts.append(f"by {name} {told}")
        return f"It holds in {percent(float(holds.mean()))} of the map: {'; '.join(parts)}."

    return said


def _row(place: str, shows: str, experiment: str, claims: Mapping[str, str]) -> Row:
    return Row(
        place,
        shows,
        experiment,
        tuple(
            Claim(
                statement,
                {"largest": Bound(at_most=1.0)},
                _worst(conclusion),
                f"{conclusion}; the largest of the map",
                basis=CONTROL,
                reason=_where(conclusion),
            )
            for conclusion, statement in claims.items()
        ),
    )


MAP_ROWS: Final = (
    _row(
        "Map of validity, K-FAC",
        "Block-tridiagonal beside block-diagonal inverse, both held against (F + λI)⁻¹.",
        "validity-kfac",
        {
            "error of F̂⁻¹ / F̆⁻¹": "The block-tridiagonal inverse is the nearer everywhere.",
            "error of F̂⁻¹": "It is nearer to the exact inverse than zero is, everywhere.",
        },
    ),
    _row(
        "Map of validity, KPSVD",
        "What being the nearest Kronecker product to F is worth in inverse and step.",
        "validity-kpsvd",
        {
            "inverse error, KPSVD / KFAC": "Its inverse is nearer than KFAC's everywhere.",
            "1 − cosine, KPSVD / KFAC": "So is its step.",
        },
    ),
    _row(
        "Map of validity, MBF",
        "The step by per-example mini-blocks between the diagonal's and KFAC's.",
        "validity-mbf",
        {
            "1 − cosine, MBF / diagonal": (
                "Mini-blocks are nearer to the step of dense blocks than the diagonal is."
            ),
            "1 − cosine, KFAC / MBF": "KFAC is nearer than mini-blocks.",
        },
    ),
)
