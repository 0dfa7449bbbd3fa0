"""What each variable of a result means: title, formula, and which way is better."""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

FLOOR: Final = 1e-6
"""Below this a relative error is a difference of equal numbers, not a measurement."""


def below_floor(error: float) -> bool:
    """Say whether a relative error is at or below the numerical floor.

    Examples
    --------
    >>> below_floor(1e-6), below_floor(2e-6)
    (True, False)
    """
    # A metric may return the floor itself, and a mean of floors may round up.
    return abs(error) <= FLOOR * (1 + 1e-9)


def overall(errors: NDArray[Any], norms: NDArray[Any] | None = None) -> float:
    """Return the error of all layers together, √(Σ‖F − F̂‖² / Σ‖F‖²), or the median.

    Unlike a geometric mean it is not ruled by one layer that is matched exactly.

    Parameters
    ----------
    errors
        Relative errors ‖F − F̂‖/‖F‖; NaN is left out, below the floor the floor counts.
    norms
        ‖F‖ of the same layers; the median of the errors without.

    Examples
    --------
    >>> round(overall(np.array([0.8, 1e-16]), np.array([3.0, 4.0])), 6)
    0.48
    >>> overall(np.array([0.8, 0.6, 1e-16]))
    0.6
    """
    known = np.isfinite(errors)
    if not known.any():
        return float("nan")
    errors = np.maximum(errors[known], FLOOR)
    if norms is None or not np.isfinite(norms[known]).all() or not norms[known].any():
        return float(np.median(errors))
    norms = norms[known]
    return float(np.linalg.norm(errors * norms) / np.linalg.norm(norms))


@dataclass(frozen=True)
class Quantity:
    """One measured quantity: how it is named, written, read and ranked.

    `symbol` is mathtext for figures and `formula` plain text for pages; `best`
    says whether a low or a high value, or a value near one, is the closer.

    Examples
    --------
    >>> quantity("frobenius_error").best
    'low'
    """

    name: str
    title: str
    symbol: str = ""
    formula: str = ""
    best: Literal["low", "high", "one", "none"] = "none"
    perfect: float | None = None
    floor: float | None = None
    meaning: str = ""

    @property
    def label(self) -> str:
        """Return the text of an axis: the title and, where known, the symbol."""
        return f"{self.title}  {self.symbol}" if self.symbol else self.title


_ALL: Final = (
    Quantity(
        "frobenius_error",
        "relative error",
        r"$\|F-\hat{F}\|_F\,/\,\|F\|_F$",
        "‖F − F̂‖ / ‖F‖",
        "low",
        0.0,
        FLOOR,
        "Distance from the exact block F to its approximation F̂ in the Frobenius "
        "norm, relative to F. 0 is exact; the zero matrix has 1, and a wrong scale "
        "alone can give more.",
    ),
    Quantity(
        "cosine_similarity",
        "matrix cosine",
        r"$\langle F,\hat{F}\rangle\,/\,\|F\|\,\|\hat{F}\|$",
        "⟨F, F̂⟩ / (‖F‖ ‖F̂‖)",
        "high",
        1.0,
        None,
        "Angle between the two matrices, blind to scale: 1 where F̂ is a positive "
        "multiple of F. An F̂ far off in error but near 1 here only has a wrong scale.",
    ),
    Quantity(
        "direction_cosine",
        "direction cosine",
        r"$\cos((F+\lambda I)^{-1}g,\,(\hat{F}+\lambda I)^{-1}g)$",
        "cos( (F + λI)⁻¹g , (F̂ + λI)⁻¹g )",
        "high",
        1.0,
        None,
        "Angle between the exact damped natural gradient and the one that the "
        "approximation gives, for the gradient g of the loss. 1 means the same step "
        "up to its length.",
    ),
    Quantity(
        "inverse_error",
        "inverse error",
        r"$\|(F+\lambda I)^{-1}-(\hat{F}+\lambda I)^{-1}\|\,/\,\|(F+\lambda I)^{-1}\|$",
        "‖(F + λI)⁻¹ − (F̂ + λI)⁻¹‖ / ‖(F + λI)⁻¹‖",
        "low",
        0.0,
        FLOOR,
        "Relative Frobenius distance of the damped inverses. It depends strongly on "
        "λ: with a large λ every inverse tends to I/λ. A small error of F̂ does "
        "not imply a small error of its inverse.",
    ),
    Quantity(
        "trace_ratio",
        "trace ratio",
        r"$\mathrm{tr}\,\hat{F}\,/\,\mathrm{tr}\,F$",
        "tr F̂ / tr F",
        "one",
        1.0,
        None,
        "1 where the approximation keeps the total curvature of the layer.",
    ),
    Quantity(
        "scale_optimal_error",
        "error after rescaling",
        r"$\min_c\,\|F-c\hat{F}\|\,/\,\|F\|$",
        "min over c of ‖F − c F̂‖ / ‖F‖ = √(1 − cos²)",
        "low",
        0.0,
        FLOOR,
        "What is left of the relative error when F̂ may be multiplied by the best "
        "number: the error of its shape alone.",
    ),
    Quantity(
        "optimal_scale",
        "optimal scale",
        r"$c^*=\langle F,\hat{F}\rangle\,/\,\|\hat{F}\|^2$",
        "c* = ⟨F, F̂⟩ / ‖F̂‖²",
        "one",
        1.0,
        None,
        "The number by which F̂ would have to be multiplied to be closest to F. "
        "A damping chosen for F fits F̂ only if it is near 1.",
    ),
    Quantity(
        "diagonal_correlation",
        "diagonal correlation",
        r"$\mathrm{corr}(\mathrm{diag}\,F,\,\mathrm{diag}\,\hat{F})$",
        "Pearson correlation of diag F and diag F̂",
        "high",
        1.0,
        None,
        "Whether the approximation ranks the single weights by their curvature as F "
        "does; it is what pruning and elastic weight consolidation read.",
    ),
    Quantity(
        "spectral_error",
        "spectral error",
        r"$\|F-\hat{F}\|_2\,/\,\|F\|_2$",
        "‖F − F̂‖₂ / ‖F‖₂",
        "low",
        0.0,
        FLOOR,
        "The largest error in any one direction, relative to the largest curvature.",
    ),
    Quantity(
        "spectrum_error",
        "spectrum error",
        r"$\|\sigma(F)-\sigma(\hat{F})\|\,/\,\|\sigma(F)\|$",
        "‖σ(F) − σ(F̂)‖ / ‖σ(F)‖, singular values in descending order",
        "low",
        0.0,
        FLOOR,
        "Whether the singular values agree, whatever the directions they belong to "
        "(“Error 2” of Koroko et al.).",
    ),
    Quantity(
        "log_spectrum_distance",
        "log-spectrum distance",
        r"$\mathrm{rms}\,\log\frac{\lambda_i+\lambda}{\hat{\lambda}_i+\lambda}$",
        "root mean square of log( (λᵢ + λ) / (λ̂ᵢ + λ) )",
        "low",
        0.0,
        None,
        "Distance of the damped spectra on a log scale, where small eigenvalues count "
        "as much as large ones: what an inverse sees.",
    ),
    Quantity(
        "effective_rank",
        "effective rank",
        r"$(\mathrm{tr}\,\hat{F})^2\,/\,\|\hat{F}\|^2$",
        "(tr F̂)² / ‖F̂‖²",
        meaning="How many directions share the curvature: 1 for a rank-one matrix, p for a "
        "multiple of the identity. Compare with the row `exact`.",
    ),
    Quantity(
        "subspace_overlap",
        "overlap of top subspaces",
        r"$\|U_k^T\hat{U}_k\|^2\,/\,k$",
        "‖Uₖᵀ Ûₖ‖² / k",
        "high",
        1.0,
        None,
        "Share of the span of the k top eigenvectors of F that those of F̂ find; "
        "1 means the same subspace.",
    ),
    Quantity(
        "inverse_cosine",
        "cosine of the inverses",
        r"$\cos((F+\lambda I)^{-1},\,(\hat{F}+\lambda I)^{-1})$",
        "cosine of (F + λI)⁻¹ and (F̂ + λI)⁻¹",
        "high",
        1.0,
        None,
        "Angle between the damped inverses, blind to scale.",
    ),
    Quantity(
        "whitened_error",
        "whitened error",
        r"$\|P^{1/2}Q^{-1}P^{1/2}-I\|\,/\,\sqrt{p}$",
        "‖P^½ Q⁻¹ P^½ − I‖ / √p, P = F + λI, Q = F̂ + λI",
        "low",
        0.0,
        None,
        "Distance from the identity of what is left of P when it is preconditioned by "
        "Q: the error that an iterative solver or an optimiser meets.",
    ),
    Quantity(
        "gaussian_kl",
        "Gaussian KL",
        r"$\mathrm{KL}(\mathcal{N}(0,P)\,\|\,\mathcal{N}(0,Q))$",
        "KL( N(0, P) ‖ N(0, Q) ), P = F + λI, Q = F̂ + λI",
        "low",
        0.0,
        None,
        "Nats lost by coding draws of the damped exact Gaussian with the damped "
        "approximate one.",
    ),
    Quantity(
        "reverse_gaussian_kl",
        "Gaussian KL, reversed",
        r"$\mathrm{KL}(\mathcal{N}(0,Q)\,\|\,\mathcal{N}(0,P))$",
        "KL( N(0, Q) ‖ N(0, P) ), P = F + λI, Q = F̂ + λI",
        "low",
        0.0,
        None,
        "Nats lost by coding draws of the damped approximate Gaussian with the damped "
        "exact one.",
    ),
    Quantity(
        "stein_divergence",
        "Stein divergence",
        r"$\mathrm{tr}\,Q^{-1}P-\log\det Q^{-1}P-p$",
        "tr Q⁻¹P − log det Q⁻¹P − p, P = F + λI, Q = F̂ + λI",
        "low",
        0.0,
        None,
        "Twice the Gaussian KL.",
    ),
    Quantity(
        "f_cosine_squared",
        "F-cosine squared",
        r"$\cos^2_{F+\lambda I}(p_Q,\,p^*)$",
        "share of the best decrease of the damped quadratic model",
        "high",
        1.0,
        None,
        "Which share of the largest decrease of the damped quadratic model the "
        "approximation's step reaches when its length is chosen best.",
    ),
    Quantity(
        "model_decrease_ratio",
        "model decrease, unscaled",
        r"$M(p_Q)\,/\,M(p^*)$",
        "M(p_Q) / M(p*)",
        "high",
        1.0,
        None,
        "The same for the step as it comes, its length unchanged; at most 1, negative "
        "where the step is so long that the model grows.",
    ),
    Quantity(
        "gamma_ratio",
        "gamma ratio",
        r"$\gamma(\hat{F})\,/\,\gamma(I)$",
        "γ(F̂) / γ(I)",
        "low",
        None,
        None,
        "How much farther from the best step than the plain gradient's; below 1 the "
        "approximation helps.",
    ),
    Quantity(
        "stored_numbers",
        "stored numbers",
        formula="count",
        meaning="Numbers that the approximation holds; the exact symmetric block of "
        "p parameters counts as p(p+1)/2.",
    ),
    Quantity(
        "solve_flops",
        "flops of one solve",
        formula="count",
        meaning="Floating-point operations of one application of (F̂ + λI)⁻¹ to a "
        "gradient, factorisations already made.",
    ),
)
QUANTITIES: Final = {each.name: each for each in _ALL}


def quantity(name: str, values: xr.DataArray | None = None) -> Quantity:
    """Describe a variable; one that fisherlab does not know keeps its own name.

    Examples
    --------
    >>> quantity("frobenius_error").formula
    '‖F − F̂‖ / ‖F‖'
    >>> quantity("my_metric").title
    'my metric'
    """
    if name in QUANTITIES:
        return QUANTITIES[name]
    attrs = {} if values is None else values.attrs
    return Quantity(name, str(attrs.get("long_name", name.replace("_", " "))))
