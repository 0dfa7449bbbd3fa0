"""Bahamou, Goldfarb & Ren 2022, MBF, arXiv 2202.04124: what it shows and claims.

"A mini-block Fisher method for deep neural networks".

The text was read with its formulas partly lost: settings of the group's public code stand
in, and where the paper names no damping it is an axis.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import xarray as xr

from fisherlab.reproduce.exact_statements import MINI_BLOCKS, exactly
from fisherlab.reproduce.experiment import CONTROL, PICTURE, Bound, Claim, Row
from fisherlab.reproduce.mini_block_cost import exponents
from fisherlab.reproduce.mini_block_fisher import DAMPING
from fisherlab.reproduce.mini_block_training import TRAINING_ROWS
from fisherlab.showing import number, percent, span

SMALL_RATES: Final = (0.1, 0.25, 0.5)  # η K
SEEN: Final = f"empirical Fisher, λ = {DAMPING:g} of the mean eigenvalue"


def _shares(ds: xr.Dataset, kind: str) -> xr.DataArray:
    return ds["share"].sel(fisher="empirical", of=kind, alpha=DAMPING)


def _inside(kind: str) -> Callable[[xr.Dataset], Mapping[str, float]]:
    def measure(ds: xr.Dataset) -> Mapping[str, float]:
        found = _shares(ds, kind).sel(grouping="mini-blocks")
        return {"smallest": float(found.min())}

    return measure


def _beyond_diagonal(ds: xr.Dataset) -> dict[str, float]:
    """Return the share of the squared mass off the diagonal that mini-blocks hold."""
    found = _shares(ds, "squared")
    diagonal = found.sel(grouping="diagonal")
    inside = (found.sel(grouping="mini-blocks") - diagonal) / (1 - diagonal)
    return {"smallest": float(inside.min())}


def _beyond_null(ds: xr.Dataset) -> dict[str, float]:
    found = _shares(ds, "absolute")
    others = found.sel(grouping=["by input", "random"]).max("grouping")
    return {"smallest": float((found.sel(grouping="mini-blocks") / others).min())}


def _nulls(ds: xr.Dataset) -> str:
    rows = {kind: _shares(ds, kind).mean("layer") for kind in ("absolute", "squared")}
    said = [
        f"{kind}: "
        + ", ".join(
            f"{g} {percent(float(row.sel(grouping=g)))}" for g in row["grouping"].values
        )
        for kind, row in rows.items()
    ]
    part = ds.sel(fisher="empirical", alpha=DAMPING).mean("layer")
    return (
        f"Means over layers, {'; '.join(said)}. λ exceeds "
        f"{percent(float(part['damped_share']))} of the eigenvalues, so that much of the "
        f"inverse is λ⁻¹ I ({percent(float(part['rank_share']))} are not zero)."
    )


def _mass_row(place: str, data: str, heat: str, mass: str) -> Row:
    return Row(
        place,
        f"Shares of the inverse Fisher's mass behind the heatmaps of `{heat}`, {data}.",
        mass,
        (
            Claim(
                "Most of the inverse's mass lies inside mini-blocks: sizes of entries.",
                {"smallest": Bound(at_least=0.5)},
                _inside("absolute"),
                SEEN,
                basis=PICTURE,
                reason=_nulls,
            ),
            Claim(
                "Most of the inverse's mass lies inside mini-blocks: squares.",
                {"smallest": Bound(at_least=0.5)},
                _inside("squared"),
                SEEN,
                basis=PICTURE,
                reason=_nulls,
            ),
            Claim(
                "Off the diagonal too.",
                {"smallest": Bound(at_least=0.5)},
                _beyond_diagonal,
                "share of the squares off the diagonal",
                basis=CONTROL,
                reason=_nulls,
            ),
            Claim(
                "Mini-blocks hold more than blocks by input or at random.",
                {"smallest": Bound(at_least=1.5)},
                _beyond_null,
                "ratio of shares of sizes, the best null",
                basis=CONTROL,
                reason=_nulls,
            ),
        ),
    )


def _cosines(ds: xr.Dataset) -> xr.DataArray:
    return ds["cosine"].mean(("step", "layer"))


def _level(ds: xr.Dataset) -> dict[str, float]:
    found = _cosines(ds)
    return {
        name: float(found.sel(approximator=name).mean()) for name in ("MBF", "MBF-True")
    }


def _level_reason(ds: xr.Dataset) -> str:
    found = _cosines(ds).sel(approximator="MBF")
    rows = [f"{number(float(v))} at λ = {float(v.damping):g}" for v in found]
    return f"The paper names no damping, and it decides: MBF has {', '.join(rows)}."


def _above(
    best: str, others: tuple[str, ...]
) -> Callable[[xr.Dataset], Mapping[str, float]]:
    def measure(ds: xr.Dataset) -> Mapping[str, float]:
        found = _cosines(ds)
        return {
            f"{best} − {other}": float(
                (found.sel(approximator=best) - found.sel(approximator=other)).min()
            )
            for other in others
        }

    return measure


def _kfac_reason(ds: xr.Dataset) -> str:
    found, names = _cosines(ds), ("KFAC, λI", "KFAC, √λ on each factor", "MBF")
    rows = [
        f"λ = {float(d):g}: "
        + ", ".join(
            f"{n} {number(float(found.sel(approximator=n, damping=d)))}" for n in names
        )
        for d in found["damping"].values
    ]
    return f"Its place depends on damping and its form: {'; '.join(rows)}."


def _holds(*rates: float) -> Callable[[xr.Dataset], Mapping[str, float]]:
    return lambda ds: {
        f"ηK = {rate:g}": float(ds["holds"].sel(rate=rate).mean()) for rate in rates
    }


def _ratio(ds: xr.Dataset) -> dict[str, float]:
    row = ds["worst_ratio"].sel(rate=1.0)
    return {"largest": float(row.max())}


def _overshoot(ds: xr.Dataset, rates: Sequence[float]) -> str:
    """Say in how many runs of each setting the bound holds, and when it breaks."""
    one = ds[["residual", "bound", "holds"]].sel(rate=list(rates))
    above = one["residual"] > (1 + 1e-9) * one["bound"]
    first = above.argmax("step").where(above.any("step"))
    said = [
        f"{percent(float(row.mean()))} with {row['setting'].item()}" for row in one["holds"]
    ]
    share = percent(float(one["holds"].mean()))
    return (
        f"It holds in {share} of the runs: {', '.join(said)}. Where it fails, the bound is "
        f"first crossed in step {span(first.values.ravel(), '{:.0f}'.format)}."
    )


def _exponents(ds: xr.Dataset, of: xr.DataArray) -> dict[str, float]:
    found = exponents(ds, of)
    return {
        f"{kind} {method}": float(found.sel(kind=kind, approximator=method))
        for kind in ds["kind"].values
        for method in ("MBF", "KFAC", "Shampoo")
    }


def _small_matrices(ds: xr.Dataset, of: Callable[[xr.Dataset], xr.DataArray]) -> str:
    """Say how the exponents grow with the widths: the highest power is not all."""
    wide = ds["width"].isel(size=slice(-2, None)).astype(int)
    pairs = ", ".join(
        f"{kind} {' and '.join(map(str, wide.sel(kind=kind).values))}"
        for kind in ds["kind"].values
    )
    said = f"Between the widths {pairs} the highest power is not all"
    if ds.sizes["size"] < 3:
        return f"{said}."
    last, before = (_exponents(one, of(one)) for one in (ds, ds.isel(size=slice(None, -1))))
    told = ", ".join(f"{k} {number(last[k])} after {number(before[k])}" for k in last)
    return f"{said}: k is {told} between the two widths before."


def _held(ds: xr.Dataset) -> xr.DataArray:
    return ds["numbers"]


def _inverting(ds: xr.Dataset) -> xr.DataArray:
    return ds["seconds"].sel(phase="inverse")


def _over_adam(ds: xr.Dataset) -> dict[str, float]:
    """Return the entries of a kernel's block over its weights; b (b + 1) / 2 are held."""
    last = ds.sel(kind="convolution").isel(size=-1)
    held = last["numbers"].sel(approximator="MBF") / last["weights"]
    return {"MBF / weights": 2 * float(held) - 1}


def _entries(ds: xr.Dataset) -> str:
    """Say what is held of the widest convolution."""
    last = ds.sel(kind="convolution").isel(size=-1)
    return (
        f"With {int(last['width'])} channels MBF holds "
        f"{int(last['numbers'].sel(approximator='MBF')):,} numbers, half of every "
        f"symmetric block and its diagonal, for {int(last['weights']):,} weights."
    )


ROWS: Final = (
    Row(
        "Figures 1 to 4",
        "Mini-blocks of layers and kernels, drawn.",
        missing="diagrams; nothing is measured",
    ),
    Row(
        "Figure 5 (left), Figure 14",
        "Inverse empirical Fisher of the Simple CNN's convolutions.",
        "mbf-inverse-cnn",
    ),
    _mass_row(
        "Figure 5 (left), Figure 14, in numbers",
        "Fashion-MNIST",
        "mbf-inverse-cnn",
        "mbf-mass-cnn",
    ),
    Row(
        "Figure 5 (right), Figure 13",
        "Inverse empirical Fisher of the last, middle and second layer, 256-20⁵-10.",
        "mbf-inverse-digits",
    ),
    _mass_row(
        "Figure 5 (right), Figure 13, in numbers",
        "digits",
        "mbf-inverse-digits",
        "mbf-mass-digits",
    ),
    Row(
        "Algorithm 5, Figure 6",
        "Cosines of directions with those of dense layer blocks.",
        "mbf-figure-6",
        (
            Claim(
                "MBF and MBF-True have a cosine of .6 to .7.",
                {
                    "MBF": Bound(at_least=0.55, at_most=0.75),
                    "MBF-True": Bound(at_least=0.55, at_most=0.75),
                },
                _level,
                "mean over steps, middle layers and dampings",
                reason=_level_reason,
            ),
            Claim(
                "MBF is above SGD with momentum and Adam.",
                {f"MBF − {other}": Bound(at_least=0.0) for other in ("SGD-m", "Adam")},
                _above("MBF", ("SGD-m", "Adam")),
                "least difference of means over the dampings",
                reason=_level_reason,
            ),
            Claim(
                "KFAC and Shampoo are above MBF.",
                {"KFAC, √λ on each factor − MBF": Bound(at_least=0.0)},
                _above("KFAC, √λ on each factor", ("MBF",)),
                "KFAC damped as in the paper; least difference over the dampings",
                reason=_kfac_reason,
            ),
            Claim(
                "KFAC is above MBF with λI.",
                {"KFAC, λI − MBF": Bound(at_least=0.0)},
                _above("KFAC, λI", ("MBF",)),
                "the damping of all others; least difference over the dampings",
                basis=CONTROL,
                reason=_kfac_reason,
            ),
            Claim(
                "Shampoo is above MBF.",
                {"Shampoo − MBF": Bound(at_least=0.0)},
                _above("Shampoo", ("MBF",)),
                "least difference over the dampings",
                reason=_kfac_reason,
            ),
        ),
    ),
    Row(
        "Theorem 1",
        "Linear convergence of an idealised MBF.",
        "mbf-theorem-1",
        (
            Claim(
                "‖u_k − y‖² ≤ (1 − η)ᵏ ‖u_0 − y‖² for η small enough.",
                {f"ηK = {rate:g}": Bound(at_least=1.0) for rate in SMALL_RATES},
                _holds(*SMALL_RATES),
                "share of runs in which it holds at every step",
                reason=partial(_overshoot, rates=SMALL_RATES),
            ),
            Claim(
                "η = 1/K is still small enough.",
                {"largest": Bound(at_most=1.0)},
                _ratio,
                "residual over the bound, the largest over runs and steps",
                basis=CONTROL,
                reason=partial(_overshoot, rates=(1.0,)),
            ),
        ),
    ),
    Row(
        "Algorithm 1",
        "MBF with per-example blocks.",
        "exact-statements",
        (exactly("They are blocks of the empirical Fisher.", MINI_BLOCKS),),
    ),
    *TRAINING_ROWS,
    Row(
        "Figure 12, Table 2",
        "Graph convolutional networks.",
        missing="accuracies on the citation graphs Cora, Citeseer and PubMed, whose files "
        "were not at hand",
    ),
    Row(
        "Tables 3, 6",
        "Operations and memory of each method, over the width d of a layer.",
        "mbf-cost",
        (
            Claim(
                "Memory grows as the table says.",
                {
                    "dense MBF": 3.0,
                    "dense KFAC": 2.0,
                    "dense Shampoo": 2.0,
                    "convolution MBF": 2.0,
                    "convolution KFAC": 2.0,
                    "convolution Shampoo": 2.0,
                },
                lambda ds: _exponents(ds, _held(ds)),
                "k of d^k between the two largest widths",
                0.1,
                reason=partial(_small_matrices, of=_held),
            ),
            Claim(
                "So does the time of inverses.",
                {
                    "dense MBF": 4.0,
                    "dense KFAC": 3.0,
                    "dense Shampoo": 3.0,
                    "convolution MBF": 2.0,
                    "convolution KFAC": 3.0,
                    "convolution Shampoo": 3.0,
                },
                lambda ds: _exponents(ds, _inverting(ds)),
                "k of d^k between the two largest widths",
                0.15,
                reason=partial(_small_matrices, of=_inverting),
            ),
            Claim(
                "A convolution's MBF holds |Δ| numbers where Adam holds one.",
                {"MBF / weights": 9.0},
                _over_adam,
                "entries over the weights, kernels of 3 × 3",
                0.01,
                reason=_entries,
            ),
        ),
    ),
)
