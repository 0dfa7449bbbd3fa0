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

from fisherlab.catalogue import FLOOR as FLOOR
from fisherlab.metrics.distances import cosine_similarity as cosine_similarity
from fisherlab.metrics.distances import diagonal_correlation as diagonal_correlation
from fisherlab.metrics.distances import direction_cosine as direction_cosine
from fisherlab.metrics.distances import f_cosine_squared as f_cosine_squared
from fisherlab.metrics.distances import frobenius_error as frobenius_error
from fisherlab.metrics.distances import gamma as gamma
from fisherlab.metrics.distances import gamma_ratio as gamma_ratio
from fisherlab.metrics.distances import gaussian_kl as gaussian_kl
from fisherlab.metrics.distances import inverse_cosine as inverse_cosine
from fisherlab.metrics.distances import inverse_error as inverse_error
from fisherlab.metrics.distances import model_decrease_ratio as model_decrease_ratio
from fisherlab.metrics.distances import optimal_scale as optimal_scale
from fisherlab.metrics.distances import scale_optimal_error as scale_optimal_error
from fisherlab.metrics.distances import stein_divergence as stein_divergence
from fisherlab.metrics.distances import trace_ratio as trace_ratio
from fisherlab.metrics.distances import whitened_error as whitened_error
from fisherlab.metrics.pairs import BelowFloor as BelowFloor
from fisherlab.metrics.register import Entry as Entry
from fisherlab.metrics.register import entries as entries
from fisherlab.metrics.spectra import effective_rank as effective_rank
from fisherlab.metrics.spectra import log_spectrum_distance as log_spectrum_distance
from fisherlab.metrics.spectra import spectral_error as spectral_error
from fisherlab.metrics.spectra import spectrum_error as spectrum_error
from fisherlab.metrics.spectra import subspace_overlap as subspace_overlap
from fisherlab.metrics.structure import absolute_mass as absolute_mass
from fisherlab.metrics.structure import band_mass as band_mass
from fisherlab.metrics.structure import coupling as coupling
from fisherlab.metrics.structure import cross_squares as cross_squares
from fisherlab.metrics.structure import entry_share as entry_share
from fisherlab.metrics.structure import kronecker_ratio as kronecker_ratio
from fisherlab.metrics.structure import kronecker_spectrum as kronecker_spectrum
from fisherlab.metrics.structure import kronecker_tail as kronecker_tail
from fisherlab.metrics.structure import layer_table as layer_table
from fisherlab.metrics.structure import squared_mass as squared_mass
from fisherlab.metrics.sweeps import damping_curve as damping_curve
