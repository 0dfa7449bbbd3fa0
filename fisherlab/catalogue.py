"""What every number of a result means: one row of facts for each, read by all rooms.

Metrics take from here what they need, comparisons their names and units, figures their
titles and symbols, pages their formulas. A metric is a row here and a function of that
name in `fisherlab.metrics`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
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


def total_share(own: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return Σ own / Σ exact over the layers where both are known.

    The one meaning of a cost as a share of the exact block's, in sentences, tables and
    figures: total over total, no mean of shares.

    Examples
    --------
    >>> total_share(np.array([1.0, 3.0, np.nan]), np.array([4.0, 4.0, 9.0]))
    0.5
    """
    known = np.isfinite(own) & np.isfinite(exact) & (exact > 0)
    if not known.any():
        return float("nan")
    return float(np.asarray(own)[known].sum() / np.asarray(exact)[known].sum())


Needs = Literal["matrix", "gradient", "damping"]
NEEDS: Final[dict[Needs, str]] = {
    "matrix": "the approximation and its errors",
    "gradient": "update directions",
    "damping": "damped inverses",
}
"""What a metric is taken of, in the order in which a comparison computes it."""


@dataclass(frozen=True)
class Quantity:
    """One measured quantity: how it is named, written, read, ranked and computed.

    Parameters
    ----------
    name
        Of the variable in a Dataset and of the public function.
    title
        For the heads of tables and the axes of figures.
    symbol, formula
        Mathtext for figures, and plain text for pages.
    unit
        Of the value.
    best
        Whether a low or a high value, or a value near one, is the closer.
    perfect
        The value of the exact block.
    floor
        Below this the value is no measurement.
    meaning
        What a reader is told, in a sentence or two.
    needs
        What it is taken of: F and F̂ ("matrix"), their damped forms ("damping"), or the
        update directions ("gradient"); None where it is no metric.
    default
        Whether a comparison takes it unasked: it is cheap and often read.
    long_name
        What a Dataset calls it; the title by default.

    Examples
    --------
    >>> quantity("frobenius_error").best
    'low'
    """

    name: str
    title: str
    symbol: str = ""
    formula: str = ""
    unit: str = "1"
    best: Literal["low", "high", "one", "none"] = "none"
    perfect: float | None = None
    floor: float | None = None
    meaning: str = ""
    needs: Needs | None = None
    default: bool = False
    long_name: str = ""

    @property
    def label(self) -> str:
        """Return the text of an axis: the title and, where known, the symbol."""
        return f"{self.title}  {self.symbol}" if self.symbol else self.title

    @property
    def attrs(self) -> dict[str, str]:
        """Return the attributes of its variable in a Dataset."""
        return {"long_name": self.long_name or self.title, "units": self.unit}


# What is best, and what the exact block has.
_LIKENESS: Final[dict[str, Any]] = {"best": "high", "perfect": 1.0}
_RATIO: Final[dict[str, Any]] = {"best": "one", "perfect": 1.0}
_DISTANCE: Final[dict[str, Any]] = {"best": "low", "perfect": 0.0}
_ERROR: Final = _DISTANCE | {"floor": FLOOR}
_ALL: Final = (
    Quantity(
        "frobenius_error",
        "relative error",
        long_name="relative Frobenius error",
        symbol=r"$\|F-\hat{F}\|_F\,/\,\|F\|_F$",
        formula="‖F − F̂‖ / ‖F‖",
        **_ERROR,
        needs="matrix",
        default=True,
        meaning="Distance from the exact block F to its approximation F̂ in the Frobenius "
        "norm, relative to F. 0 is exact; the zero matrix has 1, and a wrong scale alone "
        "can give more.",
    ),
    Quantity(
        "cosine_similarity",
        "matrix cosine",
        symbol=r"$\langle F,\hat{F}\rangle\,/\,\|F\|\,\|\hat{F}\|$",
        formula="⟨F, F̂⟩ / (‖F‖ ‖F̂‖)",
        **_LIKENESS,
        needs="matrix",
        default=True,
        meaning="Angle between the two matrices, blind to scale: 1 where F̂ is a positive "
        "multiple of F. An F̂ far off in error but near 1 here only has a wrong scale.",
    ),
    Quantity(
        "direction_cosine",
        "direction cosine",
        long_name="cosine of the update directions",
        symbol=r"$\cos((F+\lambda I)^{-1}g,\,(\hat{F}+\lambda I)^{-1}g)$",
        formula="cos( (F + λI)⁻¹g , (F̂ + λI)⁻¹g )",
        **_LIKENESS,
        needs="gradient",
        default=True,
        meaning="Angle between the exact damped natural gradient and the one that the "
        "approximation gives, for the gradient g of the loss. 1 means the same step up to "
        "its length.",
    ),
    Quantity(
        "inverse_error",
        "inverse error",
        long_name="relative error of the damped inverse",
        symbol=r"$\|(F+\lambda I)^{-1}-(\hat{F}+\lambda I)^{-1}\|"
        r"\,/\,\|(F+\lambda I)^{-1}\|$",
        formula="‖(F + λI)⁻¹ − (F̂ + λI)⁻¹‖ / ‖(F + λI)⁻¹‖",
        **_ERROR,
        needs="damping",
        default=True,
        meaning="Relative Frobenius distance of the damped inverses. It depends strongly "
        "on λ: with a large λ every inverse tends to I/λ. A small error of F̂ does not "
        "imply a small error of its inverse.",
    ),
    Quantity(
        "trace_ratio",
        "trace ratio",
        symbol=r"$\mathrm{tr}\,\hat{F}\,/\,\mathrm{tr}\,F$",
        formula="tr F̂ / tr F",
        **_RATIO,
        needs="matrix",
        default=True,
        meaning="1 where the approximation keeps the total curvature of the layer.",
    ),
    Quantity(
        "scale_optimal_error",
        "error after rescaling",
        long_name="relative Frobenius error after the best scaling",
        symbol=r"$\min_c\,\|F-c\hat{F}\|\,/\,\|F\|$",
        formula="min over c of ‖F − c F̂‖ / ‖F‖ = √(1 − cos²)",
        **_ERROR,
        needs="matrix",
        default=True,
        meaning="What is left of the relative error when F̂ may be multiplied by the best "
        "number: the error of its shape alone.",
    ),
    Quantity(
        "optimal_scale",
        "optimal scale",
        long_name="best scale of the approximation",
        symbol=r"$c^*=\langle F,\hat{F}\rangle\,/\,\|\hat{F}\|^2$",
        formula="c* = ⟨F, F̂⟩ / ‖F̂‖²",
        **_RATIO,
        needs="matrix",
        default=True,
        meaning="The number by which F̂ would have to be multiplied to be closest to F. A "
        "damping chosen for F fits F̂ only if it is near 1.",
    ),
    Quantity(
        "diagonal_correlation",
        "diagonal correlation",
        long_name="correlation of the diagonals",
        symbol=r"$\mathrm{corr}(\mathrm{diag}\,F,\,\mathrm{diag}\,\hat{F})$",
        formula="Pearson correlation of diag F and diag F̂",
        **_LIKENESS,
        needs="matrix",
        default=True,
        meaning="Whether the approximation ranks the single weights by their curvature as "
        "F does; it is what pruning and elastic weight consolidation read.",
    ),
    Quantity(
        "spectral_error",
        "spectral error",
        long_name="relative spectral error",
        symbol=r"$\|F-\hat{F}\|_2\,/\,\|F\|_2$",
        formula="‖F − F̂‖₂ / ‖F‖₂",
        **_ERROR,
        needs="matrix",
        meaning="The largest error in any one direction, relative to the largest "
        "curvature.",
    ),
    Quantity(
        "spectrum_error",
        "spectrum error",
        long_name="relative error of the singular values",
        symbol=r"$\|\sigma(F)-\sigma(\hat{F})\|\,/\,\|\sigma(F)\|$",
        formula="‖σ(F) − σ(F̂)‖ / ‖σ(F)‖, singular values in descending order",
        **_ERROR,
        needs="matrix",
        meaning="Whether the singular values agree, whatever the directions they belong "
        "to (“Error 2” of Koroko et al.).",
    ),
    Quantity(
        "log_spectrum_distance",
        "log-spectrum distance",
        long_name="distance of the damped log spectra",
        symbol=r"$\mathrm{rms}\,\log\frac{\lambda_i+\lambda}{\hat{\lambda}_i+\lambda}$",
        formula="root mean square of log( (λᵢ + λ) / (λ̂ᵢ + λ) )",
        **_DISTANCE,
        needs="damping",
        meaning="Distance of the damped spectra on a log scale, where small eigenvalues "
        "count as much as large ones: what an inverse sees.",
    ),
    Quantity(
        "effective_rank",
        "effective rank",
        long_name="effective rank tr²/‖·‖²",
        symbol=r"$(\mathrm{tr}\,\hat{F})^2\,/\,\|\hat{F}\|^2$",
        formula="(tr F̂)² / ‖F̂‖²",
        needs="matrix",
        meaning="How many directions share the curvature: 1 for a rank-one matrix, p for "
        "a multiple of the identity. Compare with the row `exact`.",
    ),
    Quantity(
        "subspace_overlap",
        "overlap of top subspaces",
        long_name="overlap of the leading subspaces",
        symbol=r"$\|U_k^T\hat{U}_k\|^2\,/\,k$",
        formula="‖Uₖᵀ Ûₖ‖² / k",
        **_LIKENESS,
        needs="matrix",
        meaning="Share of the span of the k top eigenvectors of F that those of F̂ find; "
        "1 means the same subspace.",
    ),
    Quantity(
        "inverse_cosine",
        "cosine of the inverses",
        long_name="cosine of the damped inverses",
        symbol=r"$\cos((F+\lambda I)^{-1},\,(\hat{F}+\lambda I)^{-1})$",
        formula="cosine of (F + λI)⁻¹ and (F̂ + λI)⁻¹",
        **_LIKENESS,
        needs="damping",
        meaning="Angle between the damped inverses, blind to scale.",
    ),
    Quantity(
        "whitened_error",
        "whitened error",
        long_name="relative whitened error",
        symbol=r"$\|P^{1/2}Q^{-1}P^{1/2}-I\|\,/\,\sqrt{p}$",
        formula="‖P^½ Q⁻¹ P^½ − I‖ / √p, P = F + λI, Q = F̂ + λI",
        **_DISTANCE,
        needs="damping",
        meaning="Distance from the identity of what is left of P when it is "
        "preconditioned by Q: the error that an iterative solver or an optimiser meets.",
    ),
    Quantity(
        "gaussian_kl",
        "Gaussian KL",
        long_name="KL(N(0, P) ‖ N(0, Q))",
        symbol=r"$\mathrm{KL}(\mathcal{N}(0,P)\,\|\,\mathcal{N}(0,Q))$",
        formula="KL( N(0, P) ‖ N(0, Q) ), P = F + λI, Q = F̂ + λI",
        unit="nat",
        **_DISTANCE,
        needs="damping",
        meaning="Nats lost by coding draws of the damped exact Gaussian with the damped "
        "approximate one.",
    ),
    Quantity(
        "reverse_gaussian_kl",
        "Gaussian KL, reversed",
        long_name="KL(N(0, Q) ‖ N(0, P))",
        symbol=r"$\mathrm{KL}(\mathcal{N}(0,Q)\,\|\,\mathcal{N}(0,P))$",
        formula="KL( N(0, Q) ‖ N(0, P) ), P = F + λI, Q = F̂ + λI",
        unit="nat",
        **_DISTANCE,
        needs="damping",
        meaning="Nats lost by coding draws of the damped approximate Gaussian with the "
        "damped exact one.",
    ),
    Quantity(
        "stein_divergence",
        "Stein divergence",
        symbol=r"$\mathrm{tr}\,Q^{-1}P-\log\det Q^{-1}P-p$",
        formula="tr Q⁻¹P − log det Q⁻¹P − p, P = F + λI, Q = F̂ + λI",
        unit="nat",
        **_DISTANCE,
        needs="damping",
        meaning="Twice the Gaussian KL.",
    ),
    Quantity(
        "f_cosine_squared",
        "F-cosine squared",
        long_name="share of the exact decrease at its best length",
        symbol=r"$\cos^2_{F+\lambda I}(p_Q,\,p^*)$",
        formula="share of the best decrease of the damped quadratic model",
        **_LIKENESS,
        needs="gradient",
        default=True,
        meaning="Which share of the largest decrease of the damped quadratic model the "
        "approximation's step reaches when its length is chosen best.",
    ),
    Quantity(
        "model_decrease_ratio",
        "model decrease, unscaled",
        long_name="share of the exact decrease at its own length",
        symbol=r"$M(p_Q)\,/\,M(p^*)$",
        formula="M(p_Q) / M(p*), M(p) = ½ pᵀ(F + λI)p − gᵀp, p* the exact step",
        **_LIKENESS,
        needs="gradient",
        default=True,
        meaning="The same for the step as it comes, its length unchanged; at most 1, "
        "negative where the step is so long that the model grows.",
    ),
    Quantity(
        "gamma_ratio",
        "gamma ratio",
        long_name="γ over that of the gradient",
        symbol=r"$\gamma(\hat{F})\,/\,\gamma(I)$",
        formula="γ(F̂) / γ(I)",
        best="low",
        needs="gradient",
        meaning="How much farther from the best step than the plain gradient's; below 1 "
        "the approximation helps.",
    ),
    Quantity(
        "stored_numbers",
        "stored numbers",
        long_name="numbers held by the approximation",
        formula="count",
        meaning="Numbers that the approximation holds; the exact symmetric block of p "
        "parameters counts as p(p+1)/2.",
    ),
    Quantity(
        "solve_flops",
        "flops of one solve",
        long_name="multiply-adds of one preconditioning",
        formula="count",
        meaning="Floating-point operations of one application of (F̂ + λI)⁻¹ to a "
        "gradient, factorisations already made.",
    ),
    Quantity("slope", "slope vᵀp of the step"),
    Quantity("curvature", "curvature pᵀPp of the step"),
    Quantity("exact_slope", "slope vᵀP⁻¹v of the exact step"),
    Quantity("gradient_slope", "slope vᵀv of the gradient"),
    Quantity("gradient_curvature", "curvature vᵀPv of the gradient"),
    Quantity("lambda", "damping λ"),
    Quantity("mean_eigenvalue", "mean eigenvalue tr F / p"),
    Quantity("fisher_norm", "Frobenius norm of the exact block"),
    Quantity("converged", "1 converged, 0 not, -1 no iteration"),
    Quantity("floored", "metrics whose number is only a bound"),
    Quantity("status", "ok, or why a value is missing"),
)
QUANTITIES: Final = {each.name: each for each in _ALL}
TEXTS: Final = ("floored", "status")
"""Those that are words, not numbers."""
METRICS: Final = {name: each for name, each in QUANTITIES.items() if each.needs}


def quantity(name: str, values: Any = None) -> Quantity:
    """Describe a variable; one that is not known here keeps the name it has.

    Parameters
    ----------
    name
        Of the variable.
    values
        The labelled array, whose `long_name` names what is not known here.

    Examples
    --------
    >>> quantity("frobenius_error").formula
    '‖F − F̂‖ / ‖F‖'
    >>> quantity("my_metric").title
    'my metric'
    """
    attrs: Mapping[str, Any] = getattr(values, "attrs", {})
    given = str(attrs.get("long_name", name.replace("_", " ")))
    return QUANTITIES.get(name) or Quantity(name, given)
