"""Preconditioners from the mean gradient of a batch.

Adam, Shampoo and TNT take moments of its modes; SOAP, KL-Shampoo and Muon rotate or whiten.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Generic, final

import torch

from fisherlab.approximators import register
from fisherlab.approximators.base import Result
from fisherlab.errors import NeedsMeanGradient
from fisherlab.layers import Block
from fisherlab.operators import (
    ModeProducts,
    OneSidedRoot,
    Operator,
    Provenance,
    RootDiagonal,
    RotatedAdam,
    WhitenedRoot,
)
from fisherlab.operators.gradient_roots import Modes, Rule, whitened
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics, MeanGradient
from fisherlab.statistics.values import summable


def mean_of(statistics: LayerStatistics | MeanGradient, method: str) -> MeanGradient:
    r"""Return the gradient of the mean loss, :math:`\frac1N \sum_n D_n`.

    Of several Monte-Carlo columns (each weighted 1/√k) it is the mean over the draws.

    Raises
    ------
    NeedsMeanGradient
        If the columns are no gradients of losses: those of `Exact()` are the columns of
        a root, whose sum means nothing, and compressed columns are mixed.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(4, 3), torch.zeros(4, 2))
    >>> stats = fl.collect(torch.nn.Linear(3, 2), data, fl.Gaussian(), fl.Empirical())
    >>> mean_of(stats["weight"], "a method").gradient.shape
    torch.Size([2, 4])
    """
    if isinstance(statistics, MeanGradient):
        return replace(statistics, gradient=summable(statistics.gradient))
    s = statistics
    columns = s.samples.columns
    kind = s.provenance.fisher
    of_losses = kind.startswith(("Empirical", "MonteCarlo")) or (not kind and columns == 1)
    if s.compressed or not of_losses:
        raise NeedsMeanGradient(
            f"{method} of block {s.name!r} takes the gradient of the mean loss, which "
            f"statistics of {kind or 'several columns'} do not give. Use Empirical(), "
            "MonteCarlo(1), or fl.mean_gradient(...)."
        )
    ones = s.samples.squared_norms().new_ones(1, columns, s.samples.examples)
    total = s.samples.combine(ones)[0] / columns**0.5
    return MeanGradient(s.block, total / s.count, s.count, s.provenance)


class OfMeanGradient(ABC, Generic[Result]):
    """The default of a method of mean gradients. Its own is `of`."""

    takes: ClassVar[str] = "mean_gradient"

    def __call__(
        self, statistics: LayerStatistics | MeanGradient, previous: Operator | None = None
    ) -> Result:
        """Return M of one block, with what moving averages act on.

        Raises
        ------
        NeedsMeanGradient
            If the statistics give no mean gradient.
        """
        mean = mean_of(statistics, repr(self))
        return self.of(mean, mean.provenance.by(repr(self)), previous)

    @abstractmethod
    def of(self, mean: MeanGradient, made: Provenance, previous: Operator | None) -> Result:
        """Return M from the mean gradient of a block."""

    def holds(self, block: Block) -> int:
        """Count the numbers of its factors; a multiple of the gradient's is none."""
        return 0


@final
@setting
class AdamPreconditioner(OfMeanGradient[RootDiagonal]):
    r"""The matrix that Adam divides by, :math:`M = \mathrm{diag}(\sqrt{v})`.

    .. math:: v = \bar D \circ \bar D, \qquad \bar D = \frac1N \sum_n D_n

    Notes
    -----
    Moving averages (`fl.average`) act on v. ``op.solve(m, damping=ε)`` is m/(√v + ε),
    Adam's direction for the momentum m. M scales as the gradient, not as its square: it is
    no estimate of F. Statistics of a layer are understood for `Empirical` and
    `MonteCarlo`; their mean gradient is taken. Holds p numbers.

    References
    ----------
    Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(4, 3), torch.zeros(4, 2))
    >>> mean = fl.mean_gradient(torch.nn.Linear(3, 2), data, fl.Gaussian())["weight"]
    >>> direction = AdamPreconditioner()(mean).solve(mean.gradient, damping=0.0)
    >>> direction.abs().mean().item()
    1.0
    """

    def of(
        self, mean: MeanGradient, made: Provenance, previous: Operator | None
    ) -> RootDiagonal:
        """Return diag(|D̄|), with its squares as the state to average."""
        return RootDiagonal(mean.gradient.square(), made)


def tensors(block: Block) -> tuple[Modes, ...]:
    """Return the tensors that the columns of a weight form.

    A fully connected weight with its bias is one matrix (d_out, d_in); a convolution a
    tensor (outputs, inputs, kernel) with the bias a vector of its own; weight and bias of
    a norm layer are two vectors.

    Examples
    --------
    >>> tensors(Block("0", "0.weight", "0.bias", (4, 3, 2, 2), 4))
    (Modes(start=0, stop=12, shape=(4, 3, 4)), Modes(start=12, stop=13, shape=(4,)))
    """
    rows, columns = block.weight_shape
    last = columns - (block.bias is not None)
    if len(block.shape) <= 1 or rows != block.shape[0]:
        return tuple(Modes(k, k + 1, (rows,)) for k in range(columns))
    if len(block.shape) == 2:
        return (Modes(0, columns, (rows, columns)),)
    kernel = prod(block.shape[2:])
    shape = (rows, block.shape[1], kernel) if kernel > 1 else (rows, block.shape[1])
    weight = Modes(0, last, shape)
    return (weight, Modes(last, columns, (rows,))) if last < columns else (weight,)


@dataclass(frozen=True)
class _OfModes(OfMeanGradient[ModeProducts]):
    """Products over the modes of a tensor, with the mode moments as the state."""

    epsilon: float
    rule: ClassVar[Rule]

    def __post_init__(self) -> None:
        """Check ε."""
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"{self!r}: a finite epsilon of at least 0 is expected.")

    def holds(self, block: Block) -> int:
        """Count the moments of all modes."""
        return sum(size**2 for modes in tensors(block) for size in modes.shape)

    def of(
        self, mean: MeanGradient, made: Provenance, previous: Operator | None
    ) -> ModeProducts:
        """Return M of the mode moments of the mean gradient."""
        layout = tensors(mean.block)
        moments = tuple(h for modes in layout for h in modes.moments(mean.gradient))
        shape = mean.weight_shape
        return ModeProducts(shape, layout, moments, self.rule, self.epsilon, made)


@final
@setting
class ShampooPreconditioner(_OfModes):
    r"""Shampoo's matrix, :math:`M = ⊗_j (H_j + εI)^{1/(2k)}` for a tensor of k modes.

    .. math:: H_j = \bar D_{(j)} \bar D_{(j)}^T, \qquad \bar D = \frac1N \sum_n D_n

    with :math:`\bar D_{(j)}` the mode-j unfolding; for a matrix
    :math:`M = (L + εI)^{1/4} ⊗ (R + εI)^{1/4}`.

    Parameters
    ----------
    epsilon
        ε, inside of the roots.

    Raises
    ------
    ValueError
        If ε is negative or not finite.

    Notes
    -----
    ``op.solve(g, damping=0)`` is Shampoo's direction; another damping is added to M.
    Moving averages act on the H_j. For the reading as an estimate of F from per-example
    gradients, L^½ ⊗ R^½, see `Shampoo`. Statistics of a layer are understood for
    `Empirical` and `MonteCarlo`. Costs p·Σ d_j multiply-adds a batch and d_j³ a mode for
    the roots, which are taken at the first question; holds Σ d_j² numbers.

    References
    ----------
    Gupta, Koren & Singer 2018, arXiv 1802.09568, Algorithm 2.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(4, 3), torch.zeros(4, 2))
    >>> mean = fl.mean_gradient(torch.nn.Linear(3, 2), data, fl.Gaussian())["weight"]
    >>> [h.shape[0] for h in ShampooPreconditioner()(mean).moments]
    [2, 4]
    """

    epsilon: float = 1e-4
    rule: ClassVar[Rule] = "shampoo"


@final
@setting
class TNTPreconditioner(_OfModes):
    r"""The matrix of tensor normal training, :math:`M = ⊗_j (\tilde H_j + εI)`.

    .. math:: \tilde H_j = \frac{H_j}{c^{k-1} \prod_{l \ne j} d_l}, \qquad
              c = \Big(\frac{\mathrm{tr} H_1}{\prod_l d_l}\Big)^{1/k}

    with the mode moments H_j of the mean gradient as in `ShampooPreconditioner`; every
    :math:`\tilde H_j` has the average eigenvalue c.

    Parameters
    ----------
    epsilon
        ε, added in every mode.

    Raises
    ------
    ValueError
        If ε is negative or not finite.

    Notes
    -----
    ``op.solve(g, damping=0)`` is TNT's direction. With ε = 0 M is the covariance of a
    tensor normal distribution with the trace of :math:`\bar D`'s outer product; with
    labels drawn from the model (``fl.mean_gradient(..., fisher=MonteCarlo(1))``) an
    estimate of F/N. Its per-example form is `TKFAC`. Costs as `ShampooPreconditioner`.

    References
    ----------
    Ren & Goldfarb 2021, arXiv 2106.02925, Algorithm 1.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(4, 3), torch.zeros(4, 2))
    >>> mean = fl.mean_gradient(torch.nn.Linear(3, 2), data, fl.Gaussian())["weight"]
    >>> trace = TNTPreconditioner(epsilon=0.0)(mean).trace()
    >>> abs(trace - mean.gradient.square().sum().item()) < 1e-4
    True
    """

    epsilon: float = 1e-2
    rule: ClassVar[Rule] = "tnt"


register.add(
    {
        "shampoo-mean": ShampooPreconditioner(),
        "tnt-mean": TNTPreconditioner(),
        "adam": AdamPreconditioner(),
    },
    estimates=False,
)


@final
@setting
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

    def holds(self, block: Block) -> int:
        """Count both moments and their bases."""
        return 2 * sum(size**2 for size in block.weight_shape)

    def of(
        self, mean: MeanGradient, made: Provenance, previous: Operator | None
    ) -> RotatedAdam:
        """Return M of one block, with what moving averages act on."""
        return RotatedAdam.of(mean.gradient, made)


@final
@setting
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

    def holds(self, block: Block) -> int:
        """Count both factors."""
        return sum(size**2 for size in block.weight_shape)

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


@final
@setting
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
            raise ValueError(f"{self!r}: a momentum of at least 0 and below 1 is expected.")

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
