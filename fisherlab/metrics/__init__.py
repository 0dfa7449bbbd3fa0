r"""How far an approximation is from the exact block: pure functions of operators.

All work in float64, form no dense block unless said, and return Python floats. F is the
exact block, F̂ the approximation, P = F + λI and Q = F̂ + λI their damped forms.

==========================  ===============================================================
of the matrices             `frobenius_error`, `scale_optimal_error`, `optimal_scale`,
                            `cosine_similarity`, `trace_ratio`, `diagonal_correlation`
of the spectra              `spectral_error`, `spectrum_error`, `log_spectrum_distance`,
                            `effective_rank`, `subspace_overlap`
of the damped inverses      `inverse_error`, `inverse_cosine`, `whitened_error`
at many dampings            `damping_curve`
of Gaussians                `gaussian_kl`, `stein_divergence`
of the update               `direction_cosine`, `f_cosine_squared`, `gamma`,
                            `gamma_ratio`, `model_decrease_ratio`
of one matrix               `kronecker_spectrum`, `kronecker_ratio`, `kronecker_tail`,
                            `squared_mass`, `absolute_mass`, `entry_share`
by name                     `entries`
of a network                `coupling`, `cross_squares`, `layer_table`, `band_mass`
==========================  ===============================================================

Differences of large numbers have a floor: below it the residual is formed where the block
is small, else a `BelowFloor` is returned, a number that says it is only a bound. A metric
that an operator cannot serve raises `fisherlab.UnsupportedMetric`.
"""

from fisherlab.catalogue import FLOOR
from fisherlab.metrics.directions import (
    direction_cosine,
    f_cosine_squared,
    gamma,
    gamma_ratio,
    model_decrease_ratio,
)
from fisherlab.metrics.divergences import gaussian_kl, stein_divergence
from fisherlab.metrics.floors import BelowFloor
from fisherlab.metrics.frobenius import (
    cosine_similarity,
    diagonal_correlation,
    frobenius_error,
    inverse_cosine,
    inverse_error,
    optimal_scale,
    scale_optimal_error,
    trace_ratio,
    whitened_error,
)
from fisherlab.metrics.kronecker import (
    kronecker_ratio,
    kronecker_spectrum,
    kronecker_tail,
)
from fisherlab.metrics.register import Entry, entries
from fisherlab.metrics.spectra import (
    effective_rank,
    log_spectrum_distance,
    spectral_error,
    spectrum_error,
    subspace_overlap,
)
from fisherlab.metrics.structure import (
    absolute_mass,
    band_mass,
    coupling,
    cross_squares,
    entry_share,
    layer_table,
    squared_mass,
)
from fisherlab.metrics.sweeps import damping_curve

__all__ = [
    "FLOOR",
    "BelowFloor",
    "Entry",
    "absolute_mass",
    "band_mass",
    "cosine_similarity",
    "coupling",
    "cross_squares",
    "damping_curve",
    "diagonal_correlation",
    "direction_cosine",
    "effective_rank",
    "entries",
    "entry_share",
    "f_cosine_squared",
    "frobenius_error",
    "gamma",
    "gamma_ratio",
    "gaussian_kl",
    "inverse_cosine",
    "inverse_error",
    "kronecker_ratio",
    "kronecker_spectrum",
    "kronecker_tail",
    "layer_table",
    "log_spectrum_distance",
    "model_decrease_ratio",
    "optimal_scale",
    "scale_optimal_error",
    "spectral_error",
    "spectrum_error",
    "squared_mass",
    "stein_divergence",
    "subspace_overlap",
    "trace_ratio",
    "whitened_error",
]
