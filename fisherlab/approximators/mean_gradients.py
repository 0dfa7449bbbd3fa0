"""Preconditioners from the mean gradient of a batch: Adam, Shampoo and TNT."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Generic, final

from fisherlab.approximators import register
from fisherlab.approximators.base import Result
from fisherlab.errors import NeedsMeanGradient
from fisherlab.layers import Block
from fisherlab.operators import ModeProducts, Operator, Provenance, RootDiagonal
from fisherlab.operators.gradient_roots import Modes, Rule
from fisherlab.showing import shown
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
        msg = (
            f"{method} of block {s.name!r} takes the gradient of the mean loss, which "
            f"statistics of {kind or 'several columns'} do not give. Use Empirical(), "
            "MonteCarlo(1), or fl.mean_gradient(...)."
        )
        raise NeedsMeanGradient(msg)
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


@shown
@final
@dataclass(frozen=True)
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
            msg = f"{self!r}: a finite epsilon of at least 0 is expected."
            raise ValueError(msg)

    def of(
        self, mean: MeanGradient, made: Provenance, previous: Operator | None
    ) -> ModeProducts:
        """Return M of the mode moments of the mean gradient."""
        layout = tensors(mean.block)
        moments = tuple(h for modes in layout for h in modes.moments(mean.gradient))
        shape = mean.weight_shape
        return ModeProducts(shape, layout, moments, self.rule, self.epsilon, made)


@shown
@final
@dataclass(frozen=True)
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


@shown
@final
@dataclass(frozen=True)
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
