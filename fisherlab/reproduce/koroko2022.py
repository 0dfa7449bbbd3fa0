"""Koroko et al. 2022, KPSVD, arXiv 2201.10285: what it shows and claims.

"Efficient approximations of the Fisher matrix in neural networks using Kronecker product
singular value decomposition".

The paper's text was not at hand: errors were read off the figures of the authors' public
code, losses are its stored arrays, and numbers of figures and algorithms are supposed.
"""

from collections.abc import Callable, Mapping
from typing import Final

import xarray as xr

from fisherlab.reproduce import exact_statements as exact
from fisherlab.reproduce.exact_statements import exactly
from fisherlab.reproduce.experiment import PICTURE, Bound, Claim, Row
from fisherlab.reproduce.training_races import at_end, short_run
from fisherlab.showing import number, percent

PUBLISHED_STEP: Final = 2_500
READ: Final = f"mean of the last moments; read off the figure at step {PUBLISHED_STEP:,}"
ORDER: Final = ("deflation", "kpsvd", "kfac")
LAST: Final = 3  # moments that are averaged, in place of the paper's smoothing
FOUR: Final = ("kfac", "kpsvd", "kfac-corrected", "deflation")
BELOW: Final = (  # better before worse
    ("kpsvd", "kfac"),
    ("deflation", "kpsvd"),
    ("deflation", "kfac-corrected"),
    ("kfac-corrected", "kfac"),
)


def _late(metric: str) -> Callable[[xr.Dataset], Mapping[str, float]]:
    def measure(ds: xr.Dataset) -> Mapping[str, float]:
        found = ds[metric].isel(step=slice(-LAST, None)).mean("step", skipna=False)
        return {name: float(found.sel(approximator=name)) for name in FOUR}

    return measure


def trained(ds: xr.Dataset) -> xr.Dataset:
    """Leave out the network at its first weights, which no figure shows."""
    return ds.isel(step=slice(1, None))


def _always_below(metric: str) -> Callable[[xr.Dataset], Mapping[str, float]]:
    def measure(ds: xr.Dataset) -> Mapping[str, float]:
        found = trained(ds)[metric]
        return {
            f"{better} / {worse}": float(
                (found.sel(approximator=better) / found.sel(approximator=worse)).max()
            )
            for better, worse in BELOW
        }

    return measure


def _scale(ds: xr.Dataset) -> str:
    names = ["trace_ratio", "scale_optimal_error"]
    one = ds[names].isel(step=slice(-LAST, None)).mean("step").sel(approximator="kfac")
    return (
        f"{_steps(ds)} KFAC's trace is {number(float(one['trace_ratio']))} of F's; "
        f"at its best scale its error is {number(float(one['scale_optimal_error']))}."
    )


def _steps(ds: xr.Dataset) -> str:
    """Say how short the training was, and in how many moments the order holds."""
    taken, rows = trained(ds), []
    for error, metric in (("1", "frobenius_error"), ("2", "spectrum_error")):
        found = [taken[metric].sel(approximator=name) for name in ORDER]
        holds = [bool(k) for k in (found[0] < found[1]) & (found[1] < found[2])]
        rows.append(f"errors {error} at {sum(holds)} of {len(holds)} moments")
    return (
        f"Step {int(ds['step'][-1]):,} of {PUBLISHED_STEP:,}: the order holds for "
        f"{' and '.join(rows)}."
    )


def _where_worse(ds: xr.Dataset) -> str:
    """Say which pairs are the other way round, and at which steps."""
    found, said = trained(ds)["frobenius_error"], []
    for better, worse in BELOW:
        ratio = found.sel(approximator=better) / found.sel(approximator=worse)
        steps = ratio["step"].values[(ratio > 1).values]
        if len(steps):
            share = percent(len(steps) / ratio.size)
            top = number(float(ratio.max()))
            said.append(
                f"{better} is above {worse} at {share} of the moments, by up to {top} at "
                f"step {int(ratio.idxmax()):,}"
            )
    return f"{'; '.join(said)}."


def _errors_row(
    place: str,
    data: str,
    experiment: str,
    first: Mapping[str, float],
    second: Mapping[str, float | Bound],
) -> Row:
    return Row(
        place,
        f"Errors 1 and 2 of five methods along Adam, {data}.",
        experiment,
        (
            Claim(
                "Error 1 of the four methods.",
                first,
                _late("frobenius_error"),
                READ,
                0.3,
                ORDER,
                reason=_scale,
            ),
            Claim(
                "Error 2 of the four methods.",
                second,
                _late("spectrum_error"),
                READ,
                0.5,
                ORDER,
                reason=_scale,
            ),
            Claim(
                "KPSVD, DEFLATION and KFAC-CORRECTED are better than KFAC at every step.",
                {f"{better} / {worse}": Bound(at_most=1 + 1e-9) for better, worse in BELOW},
                _always_below("frobenius_error"),
                "largest ratio of errors 1 over the moments",
                basis=PICTURE,
                reason=_where_worse,
            ),
        ),
    )


def _train_losses(ds: xr.Dataset) -> dict[str, float]:
    return {name.removesuffix("-koroko"): loss for name, loss in at_end(ds).items()}


def _training_row(
    place: str, data: str, losses: Mapping[str, float], order: tuple[str, ...]
) -> Row:
    claims: tuple[Claim, ...] = (
        Claim(
            "KPSVD's family ends below KFAC, KFAC below Adam and SGD.",
            losses,
            _train_losses,
            "last training loss, a mean over pixels; the stored arrays of the public code",
            0.1,
            order,
            reason=short_run,
        ),
    )
    return Row(
        place,
        f"Training losses of seven optimisers over epochs and time, {data}.",
        f"kpsvd-published-{data.lower()}",
        claims if losses else (),
        "" if losses else "the stored losses of this data set were not read",
    )


MNIST_LOSSES: Final = {
    "kfac-corrected": 0.0644,
    "lanczos": 0.0652,
    "deflation": 0.0653,
    "kfac": 0.0692,
    "kpsvd": 0.0693,
    "adam": 0.0732,
    "sgd-momentum": 0.0768,
}
_ALGORITHMS: Final = {
    "Algorithm 1": ("KPSVD by power iteration.", exact.POWER),
    "Algorithm 2": ("DEFLATION: two rank-one problems in turn.", exact.DEFLATION),
    "Algorithm 3": ("LANCZOS: both terms by bidiagonalisation.", exact.LANCZOS),
    "Algorithm 4": ("KFAC-CORRECTED.", exact.CORRECTED),
}

ROWS: Final = (
    *(
        Row(
            place,
            shows,
            "exact-statements",
            (exactly("Its error is that of singular values.", name),),
        )
        for place, (shows, name) in _ALGORITHMS.items()
    ),
    _errors_row(
        "Figure 1",
        "CURVES surrogate, layer 50→25",
        "kpsvd-errors",
        {"kfac": 0.50, "kpsvd": 0.11, "kfac-corrected": 0.12, "deflation": 0.08},
        {
            "kfac": 0.45,
            "kpsvd": Bound(at_most=0.03),
            "kfac-corrected": Bound(at_most=0.03),
            "deflation": Bound(at_most=0.03),
        },
    ),
    _errors_row(
        "Figure 2",
        "MNIST, layer 30→250",
        "kpsvd-errors-mnist",
        {"kfac": 0.21, "kpsvd": 0.13, "kfac-corrected": 0.13, "deflation": 0.11},
        {"kfac": 0.09, "kpsvd": 0.03, "kfac-corrected": 0.03, "deflation": 0.02},
    ),
    _errors_row(
        "Figure 3",
        "FACES surrogate, layer 30→500",
        "kpsvd-errors-faces",
        {"kfac": 0.42, "kpsvd": 0.26, "kfac-corrected": 0.25, "deflation": 0.21},
        {
            "kfac": 0.20,
            "kpsvd": Bound(at_most=0.06),
            "kfac-corrected": Bound(at_most=0.06),
            "deflation": Bound(at_most=0.06),
        },
    ),
    Row(
        "Proposition 3.2",
        "The factors of KPSVD are symmetric and positive semi-definite.",
        "exact-statements",
        (
            exactly(
                "Its factors are symmetric and have no negative eigenvalue.",
                exact.ASYMMETRY,
                exact.NEGATIVE,
            ),
        ),
    ),
    _training_row("Figures 4, 5 (CURVES)", "CURVES", {}, ()),
    _training_row(
        "Figures 6, 7 (MNIST)",
        "MNIST",
        MNIST_LOSSES,
        ("kfac-corrected", "kfac", "adam", "sgd-momentum"),
    ),
    _training_row("Figures 8, 9 (FACES)", "FACES", {}, ()),
    Row(
        "Section 4, at equal time",
        "Training losses over the time in steps, tuned in short runs.",
        "kpsvd-training",
    ),
    Row(
        "Tables of tuned settings",
        "Learning rates and dampings after a grid search.",
        "kpsvd-training",
        missing="the whole grid, `fisherlab tune --grid koroko`; here it is thinned out",
    ),
    Row(
        "Section 4, convolutional networks",
        "The same with convolutions.",
        missing="no source for its settings was at hand",
    ),
)
