"""Preconditioners from mean gradients that rotate or whiten: SOAP, KL-Shampoo, Muon."""

from dataclasses import dataclass
from typing import final

import torch

from fisherlab.approximators import register
from fisherlab.approximators.mean_gradients import OfMeanGradient
from fisherlab.operators import (
    OneSidedRoot,
    Operator,
    Provenance,
    RotatedAdam,
    WhitenedRoot,
)
from fisherlab.operators.gradient_roots import whitened
from fisherlab.showing import shown
from fisherlab.statistics import MeanGradient


@shown
@final
@dataclass(frozen=True)
class SOAPPreconditioner(OfMeanGradient[RotatedAdam]):
    r"""Adam's matrix in Shampoo's eigenbasis, :math:`M = Q\,\mathrm{diag}(\sqrt v)\,Q^T`.

    .. math:: L = \bar D \bar D^T, \quad R = \bar D^T \bar D, \quad Q = Q_L \otimes Q_R,
              \quad v = (Q_L^T \bar D Q_R)^{\circ 2}, \quad \bar D = \frac1N \sum_n D_n

    Notes
    -----
    A moving average (`fl.average`) acts as SOAP does: on L and R, whose basis is turned
    by one step of QR iteration a batch, and on v in the basis of its time.
    ``op.solve(m, damping=ε)`` is the direction for the momentum m. The weight is one
    matrix, a convolution's kernel with its inputs. M scales as the gradient; for the
    estimate of F see `SOAP`. Costs 3·d³ of both sides a batch; holds 2(d_out² + d_in² + p).

    References
    ----------
    Vyas et al. 2024, arXiv 2409.11321, Algorithm 3.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(4, 3), torch.zeros(4, 2))
    >>> mean = fl.mean_gradient(torch.nn.Linear(3, 2), data, fl.Gaussian())["weight"]
    >>> SOAPPreconditioner()(mean).row_basis.shape
    torch.Size([2, 2])
    """

    def of(
        self, mean: MeanGradient, made: Provenance, previous: Operator | None
    ) -> RotatedAdam:
        """Return M of one block, with what moving averages act on."""
        return RotatedAdam.of(mean.gradient, made)


@shown
@final
@dataclass(frozen=True)
class KLShampooPreconditioner(OfMeanGradient[WhitenedRoot]):
    r"""KL-Shampoo's matrix, :math:`M = (G \otimes A)^{1/2}`.

    Parameters
    ----------
    ridge
        κ as a share of the mean square of the gradient.

    Raises
    ------
    ValueError
        If the ridge is not positive.

    Notes
    -----
    A moving average (`fl.average`) is the published recursion,

    .. math:: G \leftarrow ρ G + \frac{1 - ρ}{d_{in}} \big(\bar D A^{-1} \bar D^T +
              κ\,\mathrm{tr}(A^{-1}) I\big)

    and A alike, each with the other's old value; the first batch takes a half-step from
    A = I and one from the G found. ``op.solve(g, damping=0)`` is its direction. M scales
    as the gradient; for the estimate of F see `KLShampoo`. Costs 3·d³ of both sides a
    batch; holds d_out² + d_in² + p numbers.

    References
    ----------
    Lin et al. 2025, arXiv 2509.03378.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(4, 3), torch.zeros(4, 2))
    >>> mean = fl.mean_gradient(torch.nn.Linear(3, 2), data, fl.Gaussian())["weight"]
    >>> KLShampooPreconditioner()(mean).cols.shape
    torch.Size([4, 4])
    """

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        """Check κ."""
        if not 0 < self.ridge < float("inf"):
            msg = f"{self!r}: a finite ridge above 0 is expected; one batch has rank 1."
            raise ValueError(msg)

    def of(
        self, mean: MeanGradient, made: Provenance, previous: Operator | None
    ) -> WhitenedRoot:
        """Return M of one block, with the factors that moving averages act on."""
        gradient = mean.gradient
        square = float(gradient.square().mean(dtype=torch.float64))
        eye = torch.eye(gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
        ridge = self.ridge * square
        if not square:  # nothing to whiten by: M is zero
            rows = eye.new_zeros(len(gradient), len(gradient))
            return WhitenedRoot(gradient, rows, 0 * eye, ridge, made)
        rows = whitened(gradient, eye, ridge)
        cols = whitened(gradient.T, rows, ridge)
        return WhitenedRoot(gradient, rows, cols, ridge, made)


@shown
@final
@dataclass(frozen=True)
class MuonPreconditioner(OfMeanGradient[OneSidedRoot]):
    r"""Muon's matrix, :math:`M = (B B^T)^{1/2} \otimes I`, on the shorter side of B.

    Parameters
    ----------
    momentum
        μ of :math:`B \leftarrow μB + \bar D`, which goes on from `previous`; with 0 B is
        the batch's mean gradient, or what `fl.average` makes of several.

    Raises
    ------
    ValueError
        If μ lies outside [0, 1).

    Notes
    -----
    ``op.solve(B, damping)`` is :math:`U V^T` of :math:`B = U Σ V^T` but for singular
    values near the damping, which Muon's Newton-Schulz iteration does not reach either.
    In `NaturalGradient` with the same momentum of gradients and ``average=0`` that is
    Muon (its recipe: "muon"), without Nesterov's step and the factor for the shape. For
    the reading as an estimate from per-example gradients see `Muon`. Costs 9 of the shorter
    side's d³ a batch.

    References
    ----------
    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(4, 3), torch.zeros(4, 2))
    >>> mean = fl.mean_gradient(torch.nn.Linear(3, 2), data, fl.Gaussian())["weight"]
    >>> direction = MuonPreconditioner()(mean).solve(mean.gradient, damping=1e-6)
    >>> round(float(torch.linalg.matrix_norm(direction, 2)), 3)
    1.0
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Check μ."""
        if not 0 <= self.momentum < 1:
            msg = f"{self!r}: a momentum of at least 0 and below 1 is expected."
            raise ValueError(msg)

    def of(
        self, mean: MeanGradient, made: Provenance, previous: Operator | None
    ) -> OneSidedRoot:
        """Return M of one block."""
        total = mean.gradient
        if self.momentum and isinstance(previous, OneSidedRoot):
            total = total + self.momentum * previous.gradient
        return OneSidedRoot(total, made)


register.add(
    {
        "soap-mean": SOAPPreconditioner(),
        "kl-shampoo-mean": KLShampooPreconditioner(),
        "muon-mean": MuonPreconditioner(),
    },
    estimates=False,
)
