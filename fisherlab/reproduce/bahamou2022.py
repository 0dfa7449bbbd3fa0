"""Bahamou, Goldfarb & Ren 2022, MBF, arXiv 2202.04124: what it shows and claims.

"A mini-block Fisher method for deep neural networks".

The text was read with its formulas partly lost: settings of the group's public code stand
in, and where the paper names no damping it is an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import xarray as xr

from fisherlab.analysis.wording import number, percent
from fisherlab.reproduce.autoencoder_training import FRESH
from fisherlab.reproduce.experiment import CONTROL, PICTURE, Bound, Claim, Row
from fisherlab.reproduce.martens2015 import short_run
from fisherlab.reproduce.mini_block_fisher import DAMPING

PAPER: Final = "bahamou2022"
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
        PAPER,
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


def _overshoot(ds: xr.Dataset) -> str:
    share = percent(float(ds["holds"].sel(rate=1.0).mean()))
    return (
        f"It holds in {share} of the runs; with targets far from the outputs the first "
        "steps overshoot."
    )


def _losses(ds: xr.Dataset) -> dict[str, float]:
    last = ds["train_loss"].isel(step=-1)
    return {str(n): float(last.sel(optimizer=n)) for n in last["optimizer"].values}


def _short_or_stale(ds: xr.Dataset) -> str:
    """Say how MBF ended with the published inverses, 20 steps old, and with fresh ones."""
    said, fresh = short_run(ds), ds["train_loss"].isel(step=-1)
    if FRESH not in ds["optimizer"]:
        return said
    loss = float(fresh.sel(optimizer=FRESH))
    return f"{said} With inverses of every step MBF's loss is {number(loss)} at the end."


def _training_row(place: str, data: str, losses: tuple[float, ...]) -> Row:
    names = ("mbf-shared", "kfac-goldfarb", "shampoo", "adam", "sgd-momentum")
    published = dict(zip(names, losses, strict=True))
    return Row(
        PAPER,
        place,
        f"Training losses of five optimisers over epochs and time, {data}.",
        f"mbf-training-{data.lower()}",
        (
            Claim(
                "Final training losses at the tuned settings.",
                published,
                _losses,
                "nats a picture (FACES: half the squared error); CURVES and FACES are "
                "surrogates",
                0.05,
                tuple(sorted(published, key=lambda name: published[name])),
                reason=_short_or_stale,
            ),
            Claim(
                "The same without MBF.",
                others := {name: published[name] for name in names[1:]},
                _losses,
                tolerance=0.05,
                order=tuple(sorted(others, key=lambda name: others[name])),
                reason=short_run,
            ),
        ),
    )


def _cnn_row(place: str, shows: str, data: str) -> Row:
    return Row(
        PAPER,
        place,
        shows,
        missing=f"days on a CPU and {data}; `fisherlab follow --problem` trains it",
    )


ROWS: Final = (
    Row(
        PAPER,
        "Figures 1 to 4",
        "Mini-blocks of layers and kernels, drawn.",
        missing="diagrams; nothing is measured",
    ),
    Row(
        PAPER,
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
        PAPER,
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
        PAPER,
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
        PAPER,
        "Theorem 1",
        "Linear convergence of an idealised MBF.",
        "mbf-theorem-1",
        (
            Claim(
                "‖u_k − y‖² ≤ (1 − η)ᵏ ‖u_0 − y‖² for η small enough.",
                {f"ηK = {rate:g}": Bound(at_least=1.0) for rate in (0.1, 0.25, 0.5)},
                _holds(0.1, 0.25, 0.5),
                "share of runs in which it holds at every step",
            ),
            Claim(
                "η = 1/K is still small enough.",
                {"largest": Bound(at_most=1.0)},
                _ratio,
                "residual over the bound, the largest over runs and steps",
                basis=CONTROL,
                reason=_overshoot,
            ),
        ),
    ),
    Row(PAPER, "Algorithm 1", "MBF with per-example blocks.", missing="`fl.MiniBlock()`"),
    _training_row(
        "Algorithm 2, Figures 7, 8, Table 4 (MNIST)",
        "MNIST",
        (51.49, 53.56, 53.80, 53.67, 55.63),
    ),
    _training_row("Figures 7, 8, Table 4 (FACES)", "FACES", (5.17, 5.55, 7.21, 5.55, 7.08)),
    _training_row(
        "Figure 15, Table 4 (CURVES)", "CURVES", (55.14, 56.47, 54.86, 55.23, 55.49)
    ),
    _cnn_row(
        "Figure 9, Table 1", "ResNet-32 on CIFAR-10, validation accuracy.", "full CIFAR-10"
    ),
    _cnn_row(
        "Figure 10, Table 1", "VGG-16 on CIFAR-100, validation accuracy.", "CIFAR-100"
    ),
    _cnn_row("Figure 11, Table 1", "VGG-11 on SVHN, validation accuracy.", "SVHN"),
    Row(
        PAPER,
        "Figure 12, Table 2",
        "Graph convolutional networks.",
        missing="no such problem is described here",
    ),
    Row(
        PAPER,
        "Tables 3, 6",
        "Operations and memory of each method.",
        missing="`fl.estimate` counts them; no time is published",
    ),
    Row(
        PAPER,
        "Tables 5, 7, 8",
        "Ranges of the grid search and the settings chosen.",
        missing="`fisherlab tune --grid bahamou` searches; the runs take the chosen ones",
    ),
    Row(
        PAPER,
        "Algorithm 3",
        "Spatial averaging of large layers.",
        missing="the runs of Table 4 use it, `MiniBlock(spatial_average=True)`",
    ),
    Row(
        PAPER,
        "Algorithm 4, Figures 16, 17",
        "MBF-True beside MBF in training.",
        missing="`fisherlab follow --optimizer mbf-true`; its directions are in Figure 6",
    ),
    Row(
        PAPER,
        "Figure 18",
        "Sensitivity to learning rate and damping.",
        missing="`fisherlab tune --optimizers mbf` gives the table, no figure here",
    ),
)
