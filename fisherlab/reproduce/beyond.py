"""Controls that none of the four papers shows, judged like their claims.

The numbers held against are bounds for a statement that was found here and that another
run may refute.
"""

import math
from functools import partial
from typing import Final

import numpy as np
import xarray as xr

from fisherlab.reproduce.chen2021 import share
from fisherlab.reproduce.error_controls import CONTROL_ROWS
from fisherlab.reproduce.experiment import CONTROL, Bound, Claim, Row
from fisherlab.reproduce.koroko2022 import MNIST_LOSSES, trained
from fisherlab.reproduce.kpsvd_candidates import CORRECTED, OWN, TERMS
from fisherlab.reproduce.purposes_along import PURPOSE_ROWS
from fisherlab.reproduce.validity_maps import MAP_ROWS
from fisherlab.showing import number, percent


def _shares(ds: xr.Dataset) -> xr.DataArray:
    """Return the share of KPSVD's gain over KFAC that TKFAC has, at every moment."""
    found = trained(ds)["frobenius_error"]
    kfac, kpsvd, tkfac = (found.sel(approximator=k) for k in ("kfac", "kpsvd", "tkfac"))
    return (kfac - tkfac) / (kfac - kpsvd)


def _share(ds: xr.Dataset) -> dict[str, float]:
    return {"least share": float(_shares(ds).min())}


def _shape(ds: xr.Dataset) -> str:
    """Say where the share is least what the scale does, and what the power steps do.

    TKFAC's factors are the first power step from the identity towards KPSVD's, and every
    step takes (σ₂ / σ₁)² of what is left, with σ the singular values of F rearranged:
    those of the errors of one and of two terms.
    """
    step = int(_shares(ds).idxmin())
    at = ds[["frobenius_error", "scale_optimal_error"]].sel(step=step)
    names = ("kfac", "kpsvd", "deflation")
    kfac, one, two = (float(at["frobenius_error"].sel(approximator=k)) for k in names)
    scaled = float(at["scale_optimal_error"].sel(approximator="kfac"))
    ratio = ((one**2 - two**2) / (1 - one**2)) ** 0.5
    return (
        f"At step {step:,} KFAC's best scale has {percent((kfac - scaled) / (kfac - one))} "
        "of the gain; the rest is shape. TKFAC's factors are the first power step from the "
        "identity towards KPSVD's, and the second singular value is "
        f"{number(ratio)} of the first."
    )


def _near(ds: xr.Dataset) -> dict[str, float]:
    found = trained(ds)["frobenius_error"]
    ratio = found.sel(approximator="tkfac") / found.sel(approximator="kpsvd")
    return {"largest TKFAC / KPSVD": float(ratio.max())}


def _falls_with_examples(ds: xr.Dataset) -> dict[str, float]:
    found = ds["by_examples"]
    first, last = found.isel(examples=0), found.isel(examples=-1)
    return {
        name: float(last.sel(approximator=name) / first.sel(approximator=name))
        for name in ("kfac", "kpsvd")
    }


def _bias(ds: xr.Dataset) -> str:
    """Say what E² = B² + C / N, fitted over the examples N, leaves without noise."""
    counts = ds["examples"].values
    limits = {
        "KFAC's": _limit(counts, ds["by_examples"].sel(approximator="kfac").values),
        "KPSVD's": _limit(counts, ds["by_examples"].sel(approximator="kpsvd").values),
        "KFAC's at its best scale": _limit(
            counts, ds["scaled_by_examples"].sel(approximator="kfac").values
        ),
    }
    said = [
        f"{name} to {number(left)}, {percent(share)} of that at {counts[0]}"
        for name, (left, share, _) in limits.items()
    ]
    worst = max(miss for *_, miss in limits.values())
    return (
        f"E² = B² + C / N, fitted over the examples N, is within {percent(worst)} of every "
        f"error. With N the errors tend to their bias B: {'; '.join(said)}."
    )


def _limit(counts: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Return B, B over the first error, and the largest relative miss of the fit."""
    slope, square = np.polyfit(1 / counts, errors**2, 1)
    fitted = np.sqrt(square + slope / counts)
    bias = float(np.sqrt(max(square, 0.0)))
    return bias, bias / float(errors[0]), float(np.abs(fitted / errors - 1).max())


def _by_layer(ds: xr.Dataset) -> dict[str, float]:
    found = ds["by_layer"]
    ratio = found.sel(approximator="kpsvd") / found.sel(approximator="kfac")
    return {"smallest": float(ratio.min()), "largest": float(ratio.max())}


def _worse_layers(ds: xr.Dataset) -> str:
    """Say in which layers KPSVD is the worse."""
    found = ds["by_layer"]
    ratio = found.sel(approximator="kpsvd") / found.sel(approximator="kfac")
    said = [f"{row['layer'].item()} ({number(float(row))})" for row in ratio if row > 1]
    return f"KPSVD over KFAC is above one in {', '.join(said) or 'no layer'}."


def _last(ds: xr.Dataset, candidate: str) -> dict[str, float]:
    """Return the last losses over KFAC's."""
    last = ds["relative"].sel(candidate=candidate).isel(step=-1)
    return {name.removesuffix("-koroko"): float(last.sel(optimizer=name)) for name in TERMS}


def _candidates(ds: xr.Dataset) -> str:
    """Say how far the other methods end from KFAC under each candidate."""
    said = []
    for name in ds["candidate"].values:
        last = _last(ds, name)
        parts = [
            f"{method.upper()} {number(ratio)}"
            for method, ratio in last.items()
            if method != "kfac" and math.isfinite(ratio)
        ]
        said.append(f"{name}: {', '.join(parts) or 'no run ended'}")
    return f"Losses over KFAC's after {ds.attrs['steps']:,} steps: {'; '.join(said)}."


def _quickest(ds: xr.Dataset) -> str:
    ratio = ds["time_ratio"]
    at = ratio.isel(ratio.argmin(...))
    return (
        f"At best it takes {number(float(at))} of K-FAC's time, with d = "
        f"{int(at['width'])}, m = {int(at['batch'])}, λ = {float(at['alpha']):g} of the "
        f"mean eigenvalue and tolerance {float(at['residual']):g}; the median is "
        f"{number(float(ratio.median()))}."
    )


def _trace_row(data: str, experiment: str) -> Row:
    return Row(
        f"The right trace, {data}",
        "How much of KPSVD's gain over KFAC is TKFAC's, which has F's partial traces.",
        experiment,
        (
            Claim(
                "TKFAC has nine tenths of the gain at every step.",
                {"least share": Bound(at_least=0.9)},
                _share,
                "(KFAC − TKFAC) / (KFAC − KPSVD), errors 1",
                basis=CONTROL,
                reason=_shape,
            ),
            Claim(
                "TKFAC is within 4 % of KPSVD at every step.",
                {"largest TKFAC / KPSVD": Bound(at_most=1.04)},
                _near,
                "errors 1",
                basis=CONTROL,
                reason=_shape,
            ),
        ),
    )


_TWO_TERMS: Final = Row(
    "Two terms beside one in training",
    "Losses over KFAC's at the published settings, at equal ones, and one change each.",
    "kpsvd-candidates",
    (
        Claim(
            "Two-term sums end below KFAC at the published settings.",
            {
                name: MNIST_LOSSES[name] / MNIST_LOSSES["kfac"]
                for name in ("kfac-corrected", "deflation", "kpsvd")
            },
            partial(_last, candidate=OWN),
            "losses over KFAC's; the published ones after 200 epochs",
            0.03,
            ("kfac-corrected", "deflation", "kpsvd"),
            reason=_candidates,
        ),
        Claim(
            "They do with KFAC-CORRECTED's rate and damping for all.",
            {name: Bound(at_most=1.0) for name in ("kfac-corrected", "deflation")},
            partial(_last, candidate=CORRECTED),
            "losses over KFAC's",
            basis=CONTROL,
            reason=_candidates,
        ),
    ),
)

ROWS: Final = (
    _trace_row("CURVES surrogate", "kpsvd-errors"),
    _trace_row("MNIST", "kpsvd-errors-mnist"),
    _trace_row("FACES surrogate", "kpsvd-errors-faces"),
    Row(
        "Examples behind the errors",
        "Error 1 of the same weights over the number of examples, and layer by layer.",
        "kpsvd-controls",
        (
            Claim(
                "Errors halve from 128 to 2,048 examples, the weights unchanged.",
                {"kfac": Bound(at_most=0.6), "kpsvd": Bound(at_most=0.6)},
                _falls_with_examples,
                "error 1 at 2,048 over that at 128 examples",
                basis=CONTROL,
                reason=_bias,
            ),
            Claim(
                "KPSVD is better than KFAC in every layer.",
                {"smallest": Bound(at_most=1.0), "largest": Bound(at_most=1 + 1e-9)},
                _by_layer,
                "errors 1, KPSVD over KFAC",
                basis=CONTROL,
                reason=_worse_layers,
            ),
        ),
    ),
    _TWO_TERMS,
    *MAP_ROWS,
    Row(
        "Map of validity, CG-FAC",
        "Its time over that of K-FAC, over the width, the examples and λ.",
        "cg-fac-cost",
        (
            Claim(
                "It is quicker than K-FAC everywhere.",
                {"share of settings": Bound(at_least=1.0)},
                partial(share, of="time_ratio", most=1.0),
                "processor time of a refresh and a step at most K-FAC's",
                basis=CONTROL,
                reason=_quickest,
            ),
        ),
        "the depth, as every layer is solved by itself",
    ),
    *CONTROL_ROWS,
    *PURPOSE_ROWS,
)
