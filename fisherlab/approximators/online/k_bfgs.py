"""K-BFGS: Kronecker factors of an inverse that quasi-Newton updates learn."""

from dataclasses import dataclass, replace
from functools import reduce
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.kronecker.kfac import rows_by_part
from fisherlab.numerics.linalg import damped_cholesky
from fisherlab.numerics.packed import second_moment
from fisherlab.operators import Operator, QuasiNewtonFactors
from fisherlab.operators.dampings import tikhonov
from fisherlab.operators.quasi_newton import HeldInverse, PairsInverse, bfgs
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics

CURVATURE = 0.2  # μ₁, the share of yᵀHy that sᵀy is lifted to


@final
@dataclass(frozen=True, eq=False)
class Observation:
    """Means over a batch of a layer's outputs and of the gradients there.

    Parameters
    ----------
    output, gradient
        h̄ and ḡ, shape (d_out,).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> layer, data = torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, 2))
    >>> stats = fl.collect(layer, data, fl.Gaussian(), fl.Empirical())["weight"]
    >>> w = stats.pack(dict(layer.named_parameters())).detach()
    >>> Observation.of(stats, w).gradient.shape
    torch.Size([2])
    """

    output: Float[Tensor, " o"]
    gradient: Float[Tensor, " o"]

    @classmethod
    def of(cls, statistics: LayerStatistics, w: Float[Tensor, "o i"]) -> "Observation":
        """Observe a batch, from its statistics and the packed weight w they were taken at.

        Parameters
        ----------
        statistics
            With the labels of the data (`Empirical`).
        w
            The weight with its bias column, as `LayerStatistics.pack` gives it.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        gradient, inputs, _ = _means(statistics, of_products=False)
        return cls(w @ inputs, gradient)


def _means(
    statistics: LayerStatistics, *, of_products: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of g, of a and, if asked for, of a aᵀ, part by part."""
    parts = (
        (g.sum(0), a.sum(0), second_moment(a) if of_products else a.new_zeros(()))
        for g, a in rows_by_part(statistics, "K-BFGS")
    )
    gradient, inputs, products = (reduce(torch.add, t) for t in zip(*parts, strict=True))
    samples = statistics.samples
    rows = samples.examples * samples.positions
    return gradient / (samples.columns * rows), inputs / rows, products / rows


def damped_pair(
    s: Tensor, y: Tensor, turned: Tensor, least: float
) -> tuple[Tensor, Tensor]:
    r"""Return (s, y) with a curvature bounded on both sides (double damping).

    First s is moved towards Hy until :math:`s^T y \ge 0.2\, y^T H y`, then y towards s
    until :math:`s^T y \ge \mathrm{least} \cdot s^T s`.

    Parameters
    ----------
    s, y
        Change of the outputs and of the gradients.
    turned
        H y.
    least
        μ₂, the smallest curvature.

    Examples
    --------
    >>> s, y = damped_pair(*(torch.tensor([v]) for v in (-1.0, 1.0, 1.0)), least=0.5)
    >>> round(float(s), 4), round(float(y), 4)
    (0.2, 1.0)
    """
    product, length = s @ y, y @ turned
    if bool(product < CURVATURE * length):
        share = (1 - CURVATURE) * length / (length - product)
        s = share * s + (1 - share) * turned
    product, square = s @ y, s @ s
    if bool(product < least * square):
        share = (1 - least) * square / (square - product)
        y = share * y + (1 - share) * s
    return s, y


@shown
@numeric
@final
@dataclass(frozen=True)
class KBFGS:
    r"""K-BFGS, the matrix whose inverse is :math:`H_g ⊗ H_a`.

    H_a follows :math:`(A + \sqrtλ I)^{-1}` for the averaged second moment A of the
    inputs, by one BFGS update a batch with :math:`s = H_a \bar a, y = (A + \sqrtλ I) s`.
    H_g follows the inverse Hessian with respect to the outputs: `observe` is given the
    batch before and after a step and updates with the damped averages of
    :math:`s = \bar h^+ - \bar h, y = \bar g^+ - \bar g`.

    Parameters
    ----------
    damping
        λ, inside of the factors.
    decay
        The share of the old A, s and y in their averages.
    memory
        How many pairs (s, y) represent H_g (K-BFGS(L)); None holds H_g itself.

    Raises
    ------
    ValueError
        If λ is not positive, the decay outside [0, 1), or the memory not positive.

    Notes
    -----
    ``op.solve(g, damping=0)`` is the published direction H_g g H_a; another damping is
    added to the matrix. `previous` holds the state; do not average in addition. The
    first call inverts A + √λI, later ones cost O(d_in² N), `observe` O(d_out²).

    References
    ----------
    Goldfarb, Ren & Bahamou 2020, arXiv 2006.08877, Algorithms 1 to 3.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> layer, data = torch.nn.Linear(3, 2), (torch.eye(3), torch.zeros(3, 2))
    >>> def observed():
    ...     return fl.collect(layer, data, fl.Gaussian(), fl.Empirical())["weight"]
    >>> method, before = KBFGS(), observed()
    >>> w = before.pack({"weight": layer.weight.data, "bias": layer.bias.data})
    >>> op = method(before)
    >>> step = op.solve(before.example_gradients()[0].mean(0), damping=0.0)
    >>> for name, change in before.unpack(step).items():
    ...     _ = layer.get_parameter(name).data.sub_(0.1 * change)
    >>> after = Observation.of(observed(), w - 0.1 * step)
    >>> method.observe(op, Observation.of(before, w), after).rows.matrix.shape
    torch.Size([2, 2])
    """

    damping: float = 0.3
    decay: float = 0.9
    memory: int | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        object.__setattr__(self, "damping", tikhonov(self.damping, "KBFGS"))
        memory = 1 if self.memory is None else self.memory
        if not (self.damping > 0 and 0 <= self.decay < 1 and memory >= 1):
            msg = (
                f"{self!r}: a positive damping, a decay in [0, 1) and a positive memory "
                "are expected."
            )
            raise ValueError(msg)

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> QuasiNewtonFactors:
        """Return the factors with H_a updated on a batch; H_g stays as it is.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        ValueError
            If `previous` was made by another method.
        """
        like, mean, moment = _means(statistics, of_products=True)
        made = statistics.provenance.by(repr(self))
        if previous is None:
            root = self.damping**0.5
            factor = damped_cholesky(moment, root, f"the inputs of {statistics.name!r}")
            columns = torch.cholesky_inverse(factor).to(moment.dtype)
            return QuasiNewtonFactors(self._start(like), columns, moment, None, made)
        if not isinstance(previous, QuasiNewtonFactors):
            msg = f"KBFGS: previous is {previous!r}; an operator of KBFGS is expected."
            raise ValueError(msg)
        moment = self.decay * previous.moment + (1 - self.decay) * moment
        s = previous.columns @ mean
        columns = bfgs(previous.columns, s, moment @ s + self.damping**0.5 * s)
        return replace(previous, columns=columns, moment=moment, provenance=made)

    def _start(self, like: Tensor) -> HeldInverse | PairsInverse:
        if self.memory is not None:
            return PairsInverse(like, self.memory)
        return HeldInverse(torch.eye(len(like), dtype=like.dtype, device=like.device))

    def observe(
        self, operator: QuasiNewtonFactors, before: Observation, after: Observation
    ) -> QuasiNewtonFactors:
        """Return the factors with H_g updated by what a step changed on its own batch."""
        s, y = after.output - before.output, after.gradient - before.gradient
        if operator.change is not None:
            old = operator.change
            s, y = (
                torch.lerp(new, kept, self.decay)
                for new, kept in zip((s, y), old, strict=True)
            )
        turned = operator.rows.apply(y[:, None])[:, 0]
        pair = damped_pair(s, y, turned, self.damping**0.5)
        rows = operator.rows.updated(*pair)
        return replace(operator, rows=rows, change=(s, y))


register.add({"k-bfgs": KBFGS(), "k-bfgs-l": KBFGS(memory=100)}, estimates=False)
