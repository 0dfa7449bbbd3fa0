"""KFAC for recurrent layers: gradients of different times are a chain, not independent."""

from dataclasses import dataclass, replace
from typing import final

import torch

from fisherlab.approximators.base import OfSums
from fisherlab.approximators.kronecker.kfac import factor_sums
from fisherlab.approximators.states import Sums, add
from fisherlab.operators.kronecker_series import Chain, KroneckerSeries
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@shown
@final
@dataclass(frozen=True)
class RecurrentKFAC(OfSums[Sums, KroneckerSeries]):
    r"""KFAC with correlations in time, :math:`F \approx \sum_{|d|<T} (T - |d|) V_d`.

    .. math:: V_d = Ψ_G^d G_0 \otimes Ψ_A^d A_0, \quad V_{-d} = V_d^T, \quad
              Ψ_X = X_1 X_0^{-1}

    with the moments at equal and at neighbouring times,
    :math:`A_0 = E[a_t a_t^T], A_1 = E[a_t a_{t-1}^T]`, and G alike.

    Parameters
    ----------
    chain
        "symmetric" is the paper's option 1 (the symmetric part of
        :math:`X_0^{-1/2} X_1 X_0^{-1/2}`), "stationary" its option 2 (T → ∞ in the
        factored inverse). Singular values of that matrix are kept at most 1.

    Raises
    ------
    ValueError
        For a setting out of its range, which is named.

    Notes
    -----
    Positions must be in the order of time, as those of a layer called once a step are;
    `unrolled` makes that of a fused LSTM, GRU or RNN. T is their mean number. KFAC
    (expand) is the term d = 0, and what is left for T = 1.
    ``op.solve(w, Factored(λ))`` is the closed form of the paper.

    References
    ----------
    Martens, Ba & Johnson 2018, "Kronecker-factored curvature approximations for
    recurrent neural networks", ICLR, section 3.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.ones(4, 5, 3), None
    >>> stats = fl.collect(torch.nn.Linear(3, 2), data, fl.Gaussian())
    >>> fl.RecurrentKFAC()(stats["weight"]).length
    5
    """

    chain: Chain = "symmetric"

    def __post_init__(self) -> None:
        """Check the kind of chain."""
        if self.chain not in ("symmetric", "stationary"):
            msg = (
                f"RecurrentKFAC(chain={self.chain!r}): 'symmetric' or 'stationary' is "
                "expected."
            )
            raise ValueError(msg)

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the moments of a chunk at equal and at neighbouring times, in float64.

        Moments in float32 know a lag between a large and a small direction to 1e-3 only.
        """
        wide = statistics.to(torch.float64)
        rows, cols = factor_sums(wide, "expand", "RecurrentKFAC")
        inputs, gradients = wide.shared("RecurrentKFAC")
        now, before = gradients[:, :, 1:].flatten(0, 2), gradients[:, :, :-1].flatten(0, 2)
        row_lags = now.T @ before
        now, before = inputs[:, 1:].flatten(0, 1), inputs[:, :-1].flatten(0, 1)
        col_lags = now.T @ before if statistics.count else cols
        sums = Sums.of(wide, rows, cols, row_lags, col_lags)
        return add(state, replace(sums, precision=statistics.samples.dtype))

    def finish(self, state: Sums) -> KroneckerSeries:
        """Divide by times and by pairs of neighbours."""
        rows, cols, row_lags, col_lags = state.tensors
        times = max(state.positions, 1)
        pairs = max(state.positions - state.count, 1)
        return KroneckerSeries(
            (rows / times, row_lags / pairs),
            (cols / times, col_lags / pairs),
            max(round(times / max(state.count, 1)), 1),
            self.chain,
            state.provenance.by(repr(self)),
            state.precision,
        )
