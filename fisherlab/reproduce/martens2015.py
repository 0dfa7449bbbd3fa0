"""Martens & Grosse 2015, K-FAC, arXiv 1503.05671: what it shows and claims.

"Optimizing neural networks with Kronecker-factored approximate curvature".

The paper's text was not at hand: numbers of figures and constants are from memory and
from a derivation of the formulas; what a picture shows without numbers is held against a
bound that says the same.
"""

import re
from collections.abc import Callable, Mapping
from itertools import product
from typing import Final

import numpy as np
import xarray as xr

from fisherlab.reproduce import exact_statements as exact
from fisherlab.reproduce import kfac_invariance, kfac_rescaling
from fisherlab.reproduce.exact_statements import exactly
from fisherlab.reproduce.experiment import CONTROL, PICTURE, Bound, Claim, Row
from fisherlab.reproduce.kfac_matrices import STRUCTURES
from fisherlab.reproduce.races import NO_MOMENTUM
from fisherlab.reproduce.training_races import (
    ends_below,
    gain_by_batch,
    iterations_saved,
    slow_start,
)
from fisherlab.showing import number, percent, span


def _of(name: str, label: str) -> Callable[[xr.Dataset], Mapping[str, float]]:
    return lambda ds: {label: float(ds[name])}


def _means_agree(ds: xr.Dataset) -> dict[str, float]:
    first, second = (ds["mean_entry"].isel(matrix=k).values.ravel() for k in (0, 1))
    return {"correlation": float(np.corrcoef(first, second)[0, 1])}


def _coarse(ds: xr.Dataset) -> str:
    """Say which pair of layers F̃ misses most in size."""
    exact, pairs = (ds["mean_entry"].isel(matrix=k) for k in (0, 1))
    ratio = pairs / exact
    away = xr.apply_ufunc(lambda r: np.abs(np.log(r)), ratio)
    at = ratio.isel(away.argmax(...))
    return (
        f"F̃'s mean |entry| over F's is {span(ratio.values.ravel())} over pairs of layers; "
        f"the farthest from one is {number(float(at))} between {at['layer'].item()} and "
        f"{at['with_layer'].item()}."
    )


def _single_entries(ds: xr.Dataset) -> str:
    """Say what is left at the best scale, and how well means over layers agree."""
    cosine = float(ds["cosine"])
    left, agree = (1 - cosine**2) ** 0.5, _means_agree(ds)["correlation"]
    return (
        f"The cosine of both is {number(cosine)}: at its best scale F̃ would still miss "
        f"{number(left)} of ‖F‖. Mean |entry| by pairs of layers correlates by "
        f"{number(agree)}; single entries do not agree as their means do."
    )


def _iterations(ds: xr.Dataset) -> dict[str, float]:
    error = ds["training_error"]
    return {f"after {k}": float(error.sel(iteration=k)) for k in (7, 22)}


def _images_decide(ds: xr.Dataset) -> str:
    """Say how the error grows with the number of images, which the paper does not tell."""
    said = [
        " and ".join(percent(float(row.sel(iteration=k))) for k in (7, 22))
        + f" with {int(row['images']):,}"
        for row in ds["error_by_images"]
    ]
    return (
        "The paper does not say how many images it takes, and that decides: after 7 and 22 "
        f"iterations the training error is {', '.join(said)} images."
    )


def _in_use(ds: xr.Dataset) -> dict[str, float]:
    return _falls(ds["distance_in_use"])


def _damping_shapes(ds: xr.Dataset) -> str:
    """Say how F̃⁻¹ with damped factors falls to the next layer over the damping."""
    rows = ds["distance"].sel(of="F̃ factored", apart=1)
    said = [f"{number(float(v))} at γ² = {float(v['damping']):g}" for v in rows]
    return f"The damping decides: one layer apart it is {', '.join(said)}."


def _falls(by_distance: xr.DataArray) -> dict[str, float]:
    return {f"{k} apart": float(by_distance.sel(apart=k)) for k in (1, 2, 3)}


def _least(of: str) -> Callable[[xr.Dataset], Mapping[str, float]]:
    def measure(ds: xr.Dataset) -> Mapping[str, float]:
        found = ds["distance"].sel(of=of)
        return _falls(found.sel(damping=float(found["damping"].min())))

    return measure


def _fall(ds: xr.Dataset, of: str) -> xr.DataArray:
    found = ds["distance"].sel(of=of)
    return found.sel(apart=3) / found.sel(apart=1)


def _fall_of_exact(ds: xr.Dataset) -> dict[str, float]:
    return {"3 apart / 1 apart": float(_fall(ds, "F Tikhonov").min())}


def _exact_reason(ds: xr.Dataset) -> str:
    least = float(ds["damping"].min())
    ratio = float(_fall(ds, "F̃ Tikhonov").sel(damping=least))
    return (
        "The look is that of the approximation: without pairs of samples F̃⁻¹ falls to "
        f"{number(ratio)} of its value at distance 1 (λ = {least:g}), F⁻¹ at best to "
        f"{number(float(_fall(ds, 'F Tikhonov').min()))}."
    )


def _by_hand(ds: xr.Dataset) -> str:
    problem, _, said = str(ds.attrs["settings"]).partition(", ")
    after = re.search(r"\d+ iterations", said)
    return (
        f"Here it is {problem} after {after[0] if after else 'another training'} of K-FAC."
    )


def _errors(ds: xr.Dataset) -> dict[str, float]:
    found = ds["relative_error"]
    return {
        str(name): float(found.sel(structure=name)) for name in found["structure"].values
    }


def _mass(ds: xr.Dataset) -> str:
    """Say what of the matrix lies within layers, between neighbours and farther."""
    entry = ds["entry"].isel(matrix=0).values.astype(float) ** 2
    edges = list(zip(ds["start"].values, ds["stop"].values, strict=True))
    mass = np.zeros(len(edges))
    for (i, (a, b)), (k, (c, d)) in product(enumerate(edges), repeat=2):
        mass[abs(i - k)] += entry[a:b, c:d].sum()
    inside, beside, *far = (percent(float(part)) for part in mass / mass.sum())
    errors = ", ".join(f"{name} {number(error)}" for name, error in _errors(ds).items())
    return (
        f"Of the squares of {ds['matrix'].values[0]} lie {inside} within layers, {beside} "
        f"between neighbours, {' and '.join(far)} farther; the errors are {errors}."
    )


def _gain(ds: xr.Dataset) -> dict[str, float]:
    found = _errors(ds)
    return {"chain / blocks": found["tridiagonal"] / found["block diagonal"]}


def _inverse_error(of: str, structure: str) -> Callable[[xr.Dataset], Mapping[str, float]]:
    def measure(ds: xr.Dataset) -> Mapping[str, float]:
        row = ds["inverse_error"].sel(of=of, structure=structure)
        return {"largest": float(row.max())}

    return measure


def _damping_decides(ds: xr.Dataset) -> str:
    rows = ds["inverse_error"].sel(structure="tridiagonal")
    parts = [f"{of}: {span(rows.sel(of=of).values.ravel())}" for of in rows["of"].values]
    return (
        f"Inverse errors of the chain over the dampings: {'; '.join(parts)}. They are of "
        "the damped matrix, whichever it is: F̃ shares the chain's form, F does not."
    )


def _divergences(ds: xr.Dataset) -> dict[str, float]:
    found = ds["divergence"].sel(of="F̃ factored")
    ratio = found.sel(structure="tridiagonal") / found.sel(structure="block diagonal")
    return {"largest ratio": float(ratio.max())}


def _nats(ds: xr.Dataset) -> str:
    """Say both divergences at every damping."""
    rows = ds["divergence"].sel(of="F̃ factored")
    said = [
        f"λ = {float(one['damping']):g}: "
        + " and ".join(number(float(one.sel(structure=s))) for s in STRUCTURES)
        for one in rows
    ]
    return f"Nats of {' and '.join(STRUCTURES)}: {'; '.join(said)}."


def _training(place: str, data: str) -> Row:
    return Row(
        place,
        f"Algorithm 2 on {data}: block diagonal, tridiagonal, tuned Nesterov SGD",
        f"kfac-training-{data.lower()}",
        (
            Claim(
                "The block-tridiagonal form needs 25 to 40 % fewer iterations.",
                {"iterations": Bound(at_least=0.6, at_most=0.75)},
                iterations_saved,
                "share of the iterations to the block-diagonal form's last training loss",
                reason=slow_start,
            ),
            ends_below(
                "K-FAC is ahead of SGD at equal iterations.",
                {"K-FAC / SGD": ("kfac-full", "sgd-nesterov")},
                reason=slow_start,
            ),
        ),
        "the momentum of SGD, 0.9, is not tuned",
    )


ROWS: Final = (
    Row(
        "Algorithm 1",
        "Gradients by backpropagation.",
        "exact-statements",
        (
            exactly(
                "Backpropagation gives the gradients of all layers.",
                exact.BACKPROPAGATION,
                most=1e-6,
            ),
        ),
    ),
    Row(
        "Figure 1",
        "The computation of a network, drawn.",
        missing="a diagram; nothing is measured",
    ),
    Row(
        "Figure 2",
        "|F|, |F̃| and |F − F̃| of the middle layers, one grey scale.",
        "kfac-figure-2",
        (
            Claim(
                "F̃ captures the coarse structure of F.",
                {"correlation": Bound(at_least=0.9)},
                _means_agree,
                "mean |entry| by pairs of layers, F beside F̃",
                basis=PICTURE,
                reason=_coarse,
            ),
            Claim(
                "F − F̃ is small beside F.",
                {"‖F − F̃‖ / ‖F‖": Bound(at_most=0.5)},
                _of("relative_error", "‖F − F̃‖ / ‖F‖"),
                basis=PICTURE,
                reason=_single_entries,
            ),
        ),
    ),
    Row(
        "Figure 2, caption",
        "The training behind Figures 2, 3, 5 and 6.",
        "kfac-iterations",
        (
            Claim(
                "The training error is 5 % after 7 iterations and 0 % after 22.",
                {"after 7": 0.05, "after 22": Bound(at_most=0.0)},
                _iterations,
                tolerance=0.5,
                reason=_images_decide,
            ),
        ),
    ),
    Row(
        "Figure 3",
        "|F̃⁻¹| and its mean |entry| by pairs of layers.",
        "kfac-figure-3",
        (
            Claim(
                "F̃⁻¹, damped as in use, is nearly block diagonal.",
                {f"{k} apart": Bound(at_most=0.1) for k in (1, 2, 3)},
                _in_use,
                "mean |entry| between layers over that within a layer",
                basis=PICTURE,
                reason=_damping_shapes,
            ),
            Claim(
                "F̃⁻¹ falls with the distance of layers also as the damping goes to 0.",
                {"1 apart": 0.30, "2 apart": 0.155, "3 apart": 0.094},
                _least("F̃ Tikhonov"),
                "F̃ + λI at the smallest λ; held against digits after 15 epochs of SGD",
                basis="computed by hand",
                order=("3 apart", "2 apart", "1 apart"),
                reason=_by_hand,
            ),
            Claim(
                "So does the inverse of the exact Fisher.",
                {"3 apart / 1 apart": Bound(at_most=0.4)},
                _fall_of_exact,
                "F + λI, the smallest over all dampings",
                basis=CONTROL,
                reason=_exact_reason,
            ),
        ),
    ),
    Row(
        "Figure 4",
        "F̂ as a Gaussian chain, drawn.",
        "exact-statements",
        (
            exactly(
                "F̂ agrees with F̃ near the diagonal, and its inverse is zero elsewhere.",
                exact.CHAIN_NEAR,
                exact.CHAIN_FAR,
            ),
        ),
        "the drawing itself",
    ),
    Row(
        "Figure 5",
        "F̃ beside F̆ and F̂.",
        "kfac-figure-5",
        (
            Claim(
                "F̂ is nearer to F̃ than F̆ is.",
                {"chain / blocks": Bound(at_most=1.0)},
                _gain,
                "ratio of relative Frobenius errors",
                basis=PICTURE,
                reason=_mass,
            ),
        ),
    ),
    Row(
        "Figure 6",
        "F̃⁻¹ beside F̆⁻¹ and F̂⁻¹.",
        "kfac-figure-6",
        (
            Claim(
                "Both inverses are close to F̃⁻¹, that of F̂ closer.",
                {"block diagonal": Bound(at_most=0.2), "tridiagonal": Bound(at_most=0.2)},
                _errors,
                "relative Frobenius errors with γ in use",
                basis=PICTURE,
                order=("tridiagonal", "block diagonal"),
                reason=_mass,
            ),
        ),
    ),
    Row(
        "Figures 5, 6 over the damping",
        "The same distances over λ, for F̃ with damped factors, F̃ + λI and F + λI.",
        "kfac-tridiagonal-damping",
        (
            Claim(
                "F̂⁻¹ is close to F̃⁻¹ at every damping of the factors.",
                {"largest": Bound(at_most=0.2)},
                _inverse_error("F̃ factored", "tridiagonal"),
                basis=PICTURE,
                reason=_damping_decides,
            ),
            Claim(
                "It is so too with λI in place of damped factors.",
                {"largest": Bound(at_most=0.2)},
                _inverse_error("F̃ Tikhonov", "tridiagonal"),
                basis=CONTROL,
                reason=_damping_decides,
            ),
            Claim(
                "It is so too for the exact Fisher.",
                {"largest": Bound(at_most=0.2)},
                _inverse_error("F Tikhonov", "tridiagonal"),
                basis=CONTROL,
                reason=_damping_decides,
            ),
            Claim(
                "F̂ is nearer than F̆ in divergence.",
                {"largest ratio": Bound(at_most=1.0)},
                _divergences,
                "KL(F̃ ‖ F̂) / KL(F̃ ‖ F̆), the largest over the dampings",
                reason=_nats,
            ),
        ),
    ),
    Row(
        "Theorem 1, Corollary 3",
        "K-FAC does not depend on affine maps of inputs and pre-activations.",
        "kfac-invariance",
        kfac_invariance.CLAIMS,
    ),
    Row(
        "Lemma 4",
        "The error of F̃ in joint cumulants.",
        "exact-statements",
        (exactly("F − F̃ is a sum of joint cumulants.", exact.CUMULANTS),),
        "its bound; `fl.decompose` measures the parts of any network",
    ),
    Row(
        "Figure 7",
        "Rescaling and damping of a single step.",
        "kfac-rescaling",
        kfac_rescaling.CLAIMS,
        "MNIST's autoencoder at iteration 500; the claims are from memory",
    ),
    Row(
        "Figure 8",
        "Progress per iteration over the size of the batch.",
        "kfac-batches",
        (
            Claim(
                "Larger batches help K-FAC more per iteration than they help SGD.",
                {"K-FAC / SGD": Bound(at_most=1.0)},
                gain_by_batch,
                "loss with 1,000 examples over that with 250, the ratio of the two",
                reason=slow_start,
            ),
        ),
        "progress per case, that per iteration over the batch",
    ),
    _training("Algorithm 2, Figures 9 and 10 (CURVES)", "CURVES"),
    _training("Figures 9 and 10 (MNIST)", "MNIST"),
    _training("Figures 9 and 10 (FACES)", "FACES"),
    Row(
        "Figure 11",
        "K-FAC without momentum, CURVES.",
        "kfac-training-curves",
        (
            ends_below(
                "Momentum makes K-FAC faster.",
                {"with / without": ("kfac-full", NO_MOMENTUM)},
                reason=slow_start,
            ),
            ends_below(
                "Without it K-FAC is still ahead of SGD.",
                {"without / SGD": (NO_MOMENTUM, "sgd-nesterov")},
                reason=slow_start,
            ),
        ),
    ),
)
