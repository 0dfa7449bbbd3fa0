r"""Two operators made ready for comparison, with what several metrics ask of both.

Each number is computed at the first question and kept: a comparison that asks for ten
metrics pays for one inner product, one pair of inverses and one pair of directions.

A relative error is the root of ``‖F‖² − 2⟨F, F̂⟩ + ‖F̂‖²``, which in float64 means
nothing below about 1e-7 of ``‖F‖``. Below `FLOOR` the residual is summed column by column
where p is at most `RESIDUAL_ROWS`; above that a `BelowFloor` is returned.

The noise floor of every comparison is how far the exact block of N examples is from its
limit of infinitely many. Split the examples into halves A and B: as they are independent,
``E‖F_A − F_B‖² = 4 E‖F − F_∞‖²``, so half of the distance of the halves estimates it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.catalogue import FLOOR
from fisherlab.errors import NumericalError
from fisherlab.numerics.devices import parse_budget, require
from fisherlab.numerics.linalg import damped_cholesky, factorised
from fisherlab.operators import (
    Dense,
    Eigenform,
    FactoredFisher,
    IterativeInverse,
    KroneckerEigen,
    KroneckerLowRank,
    KroneckerSum,
    LowRank,
    Operator,
    RowwiseEigen,
    Stacked,
    TensorEigen,
)
from fisherlab.operators.base import Damping, Factored, parsed, unit_weights
from fisherlab.operators.factored_damping import factored_form
from fisherlab.operators.kronecker import DENSE_ROWS
from fisherlab.operators.network import BlockDiagonal
from fisherlab.samples import OuterSamples, Samples

SERIES = 1e-3  # size of a relative difference whose fifth power is rounding
RESIDUAL_ROWS = 4000  # blocks whose residual is formed column by column below the floor
SINGLE_FLOOR: Final = 1e-3  # the same where an orthonormal basis is known to float32 only
EPS: Final = float(np.finfo(np.float64).eps)
LOST: Final = 1e-3  # relative rounding of an inverse above which no number is given
ROUNDING: Final = 1e-12  # share of its terms below which a difference is not measured
SMALLEST, LARGEST = 1e-150, 1e150  # sizes whose squares, and products, are numbers


@final
class BelowFloor(float):
    """A bound instead of a measured value: what was asked for is below this number.

    Examples
    --------
    >>> BelowFloor(1e-6)
    BelowFloor(1e-06)
    """

    def __repr__(self) -> str:
        """Show that the number is a bound."""
        return f"BelowFloor({float(self)!r})"


def rooted(
    squared: float, rows: int, residual: Callable[[], float], floor: float = FLOOR
) -> float:
    """Return the root of a relative difference of squares, or what is known below it.

    Parameters
    ----------
    squared
        The difference of squares, relative to a size of one.
    rows
        p, which decides whether the residual may be formed.
    residual
        Computes the same number without cancellation.
    floor
        The root below which the difference means nothing.

    Examples
    --------
    >>> rooted(0.25, 10, lambda: 0.0), rooted(1e-17, 10, lambda: 3e-9)
    (0.5, 3e-09)
    >>> rooted(1e-17, 10**6, lambda: 3e-9)
    BelowFloor(1e-06)
    """
    if squared > floor**2 or math.isnan(squared):
        return float(squared**0.5)
    return residual() if rows <= RESIDUAL_ROWS else BelowFloor(floor)


def squarable(size: float, operator: Operator) -> float:
    """Return ‖M‖, of which squares are taken: zero is that of the zero matrix alone.

    Raises
    ------
    NumericalError
        If the square is NaN or infinite, or zero though the matrix is not.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> squarable(0.0, Diagonal(torch.zeros(1, 2)))
    0.0
    """
    small = size < SMALLEST and (size > 0 or operator.trace() != 0)
    if small or not size <= LARGEST:
        raise NumericalError(
            f"{operator!r} has a norm of {size:.3g} and a trace of {operator.trace():.3g}, "
            "whose squares are no numbers of float64. Scale the data or the outputs, or "
            "leave the layer out."
        )
    return size


def measured(difference: float, *terms: float, rounding: float = ROUNDING) -> float:
    """Return a difference, or a bound where it drowns in the rounding of its terms.

    Examples
    --------
    >>> measured(0.5, 1.0, -0.5), measured(1e-17, 1.0, -1.0)
    (0.5, BelowFloor(2e-12))
    """
    bound = rounding * sum(abs(term) for term in terms)
    return difference if abs(difference) > bound else BelowFloor(bound)


def noise_floors(exact: FactoredFisher, splits: int = 8, seed: int = 0) -> list[float]:
    r"""Return ½‖F_A − F_B‖ / ‖F‖ for random halves of the examples.

    .. math:: ½ ‖F_A - F_B‖ = \frac{1}{N} \Big(\sum_{nm} s_n s_m
              \sum_{vw} ⟨D_{vn}, D_{wm}⟩^2\Big)^{1/2}

    with s = 1 on A and −1 on B (weighted where N is odd).

    Parameters
    ----------
    exact
        The exact block as samples of independent examples.
    splits
        How many random splits.
    seed
        Of the splits.

    Returns
    -------
    list of float
        One number a split; NaN for fewer than two examples or a zero block.

    Raises
    ------
    ValueError
        If no split is asked for.
    BudgetError
        If the table of inner products exceeds the memory that is free.

    Notes
    -----
    One N × N table of squared inner products, whatever the number of splits.

    Examples
    --------
    >>> samples = OuterSamples(torch.ones(4, 1), torch.ones(1, 4, 1))
    >>> noise_floors(FactoredFisher(samples, 4), splits=2)
    [0.0, 0.0]
    """
    if splits < 1:
        raise ValueError(f"noise_floors: splits={splits}; at least one is expected.")
    n = exact.samples.examples
    if n < 2:
        return [float("nan")] * splits
    samples = exact.samples.to(torch.float64)
    signs = _signs(n, splits, seed).to(samples.device)
    every = torch.cat([signs, torch.ones_like(signs[:1])])
    total = torch.zeros(splits + 1, dtype=torch.float64, device=samples.device)
    for left, right, table in _example_squares(samples):
        weight = 1.0 if left == right else 2.0
        total += weight * ((every[:, left] @ table) * every[:, right]).sum(1)
    whole = float(total[-1])
    if not whole > 0:
        return [float("nan")] * splits
    return [max(float(one) / whole, 0.0) ** 0.5 for one in total[:-1]]


def _signs(n: int, splits: int, seed: int) -> Float[Tensor, "s n"]:
    """Return N/(2 n_A) on a random half A and −N/(2 n_B) on the rest."""
    generator = torch.Generator().manual_seed(seed)
    half = n // 2
    signs = torch.full(
        (splits, n), -n / (2 * (n - half)), dtype=torch.float64, device="cpu"
    )
    for row in signs:
        row[torch.randperm(n, generator=generator, device="cpu")[:half]] = n / (2 * half)
    return signs


def _example_squares(samples: Samples) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of Σ_vw ⟨D_vn, D_wm⟩² with rows ≤ columns."""
    if isinstance(samples, OuterSamples):
        for left, right, inputs, outputs in samples.squared_grams():
            yield left, right, inputs * outputs
        return
    v, n = samples.columns, samples.examples
    require(
        3 * 8 * (v * n) ** 2,
        parse_budget(None, samples.device),
        f"noise_floors of {v * n} samples",
        "Take fewer examples, or MonteCarlo instead of Exact.",
    )
    whole = slice(0, n)
    yield whole, whole, samples.gram().square_().view(v, n, v, n).sum((0, 2))


SOLVED = 1e-9  # relative error of traces whose solves stop at a residual of 1e-10
ORTHONORMAL = (
    Eigenform,
    KroneckerEigen,
    KroneckerLowRank,
    LowRank,
    RowwiseEigen,
    TensorEigen,
)


@final
@dataclass(frozen=True, eq=False)
class Pair:
    """The exact F and an approximation F̂, both in float64.

    Parameters
    ----------
    exact, approx
        F and F̂; sums whose terms hide them are dense here, where they are small enough.
    least
        The floor of differences of squares.
    given
        F̂ in its own form, where `approx` is another.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 2).double())
    >>> Pair(one, Diagonal(3 * one.entries)).inner
    12.0
    """

    exact: Operator
    approx: Operator
    least: float = FLOOR
    given: Operator | None = None

    @property
    def source(self) -> Operator:
        """F̂ in its own form."""
        return self.approx if self.given is None else self.given

    @property
    def floor(self) -> float:
        """The relative error below which differences of squares mean nothing.

        Where large terms of opposite sign make up F̂, rounding is that of the terms.
        """
        size = min(self.exact_norm, self.approx_norm)
        behind = max(_terms_norm(self.exact), _terms_norm(self.approx))
        return self.least * max(1.0, behind / size if size > 0 else 1.0) ** 0.5

    @property
    def rows(self) -> int:
        """P."""
        return self.exact.shape[0]

    @property
    def same(self) -> bool:
        """Whether both are one object, so that every difference is exactly zero."""
        return self.exact is self.approx

    @cached_property
    def exact_size(self) -> float:
        """‖F‖, where no square of it is taken."""
        return self.exact.frobenius_norm()

    @cached_property
    def approx_size(self) -> float:
        """‖F̂‖, where no square of it is taken."""
        return self.approx.frobenius_norm()

    @property
    def exact_norm(self) -> float:
        """‖F‖; a NumericalError where its square is no number."""
        return squarable(self.exact_size, self.exact)

    @property
    def approx_norm(self) -> float:
        """‖F̂‖; a NumericalError where its square is no number."""
        return squarable(self.approx_size, self.approx)

    @cached_property
    def inner(self) -> float:
        """⟨F, F̂⟩.

        Raises
        ------
        NumericalError
            If F̂ is a sum of which its cancelling terms leave less than three digits.
        """
        if EPS * _terms_norm(self.approx) > LOST * self.approx_norm:
            raise NumericalError(
                f"{self.approx!r} has the size {self.approx_norm:.3g} and terms of size "
                f"{_terms_norm(self.approx):.3g}: float64 leaves the sum less than three "
                "digits. Scale the data, or leave out the example that rules them."
            )
        return self.exact_norm**2 if self.same else self.exact.inner(self.approx)

    @cached_property
    def cosine(self) -> float:
        """⟨F, F̂⟩ / (‖F‖ ‖F̂‖), NaN if one is zero."""
        norms = self.exact_norm * self.approx_norm
        return self.inner / norms if norms > 0 else float("nan")

    def distance(self) -> float:
        """Return ‖F − F̂‖ / ‖F‖, by squares or, below the floor, by the residual."""
        if self.same:
            return 0.0
        size, other = self.exact_norm, self.approx_norm
        if size == 0:
            return 0.0 if other == 0 else float("inf")
        squared = 1 - 2 * self.inner / size**2 + (other / size) ** 2
        return rooted(squared, self.rows, lambda: self.residual(1.0), self.floor)

    def residual(self, scale: float) -> float:
        """Return ‖F − scale·F̂‖ / ‖F‖ column by column, without cancellation."""
        total = 0.0
        for unit in unit_weights(self.exact):
            columns = (self.exact @ unit) - scale * (self.approx @ unit)
            total += float(columns.square().sum())
        return total**0.5 / self.exact_norm

    def damped(self, damping: Damping) -> "Damped":
        """Return the pair P = F + λI, Q = F̂ + λI; a factored damping is F̂'s alone.

        A relative damping is a share of the mean eigenvalue of F.

        Raises
        ------
        ValueError
            For a factored damping of an F̂ without Kronecker terms.
        NumericalError
            If a damped matrix is so ill-conditioned that float64 leaves its inverse less
            than three digits.
        """
        own = parsed(damping, self.exact)
        pair = self
        if isinstance(own, Factored):
            pair = Pair(self.exact, factored_form(self.source, own), self.floor)
        damped = Damped(pair, own.value)
        if damped.rounded > LOST:
            for one in (pair.exact, pair.approx):
                _require_digits(one, own.value)
        return damped


def _require_digits(operator: Operator, damping: float) -> None:
    """Raise if M + λI is too ill-conditioned for its inverse to be known.

    Large matrices whose eigenvalues would be those of blocks as large are held against
    their norm, which is above the largest one.
    """
    product = isinstance(operator, KroneckerSum) and len(operator.terms) == 1
    if product or operator.shape[0] <= DENSE_ROWS:
        values = operator.eigenvalues()
        top, low = float(values[0]) + damping, float(values[-1]) + damping
    else:
        top, low = max(_terms_norm(operator), operator.frobenius_norm()), damping
    if low > 0 and EPS * top > LOST * low:
        raise NumericalError(
            f"{operator!r} with damping {damping:.3g} has the condition {top / low:.1e}: "
            "float64 leaves its inverse less than three digits. Take a damping of at least "
            f"{EPS * top / LOST:.2g}."
        )


def relative_difference(f: Tensor, g: Tensor, damped: "Damped") -> Tensor:
    """Return L⁻¹ (P − Q) L⁻ᵀ with Q = L Lᵀ.

    Raises
    ------
    IndefiniteError
        If Q is not positive definite.
    """
    factor = damped_cholesky(g, damped.damping, repr(damped.pair.approx))
    half = torch.linalg.solve_triangular(factor, f - g, upper=False)
    return torch.linalg.solve_triangular(factor, half.mT, upper=False)


@final
@dataclass(frozen=True, eq=False)
class Damped:
    """P = F + λI and Q = F̂ + λI, with their inverses and determinants."""

    pair: Pair
    damping: float

    @cached_property
    def inverses(self) -> Pair:
        """P⁻¹ and Q⁻¹ as operators."""
        exact = self.pair.exact.inverse(self.damping)
        if self.pair.same:
            return Pair(exact, exact)
        return Pair(exact, self.pair.approx.inverse(self.damping), self.pair.least)

    @cached_property
    def rounded(self) -> float:
        """Relative error of the inverses: eps·max(‖F‖, ‖F̂‖)/λ at most, and at most 1."""
        pair = self.pair
        sizes = pair.exact_size, pair.approx_size, _terms_norm(pair.approx)
        return min(EPS * max(sizes) / self.damping, 1.0) if self.damping else 1.0

    @property
    def rounding(self) -> float:
        """Share of traces that is not known to three digits: of inverses, or of solves."""
        both = self.inverses.exact, self.inverses.approx
        solved = any(isinstance(one, IterativeInverse) for one in both)
        return max(self.rounded / LOST, SOLVED if solved else ROUNDING)

    def distance(self) -> float:
        """Return ‖P⁻¹ − Q⁻¹‖ / ‖P⁻¹‖, by squares or, below the floor, by the residual."""
        both = self.inverses
        size, other = both.exact_norm, both.approx_norm
        squared = 1 - 2 * both.inner / size**2 + (other / size) ** 2
        floor = max(both.floor, (self.rounded / LOST) ** 0.5)
        return rooted(squared, self.pair.rows, self.residual, floor)

    def residual(self) -> float:
        """Return ‖P⁻¹ (F̂ − F) Q⁻¹‖ / ‖P⁻¹‖ column by column: no difference of inverses."""
        total, both = 0.0, self.inverses
        for unit in unit_weights(self.pair.exact):
            turned = both.approx @ unit
            columns = both.exact @ (self.pair.approx @ turned - self.pair.exact @ turned)
            total += float(columns.square().sum())
        return total**0.5 / both.exact_norm

    @cached_property
    def residual_divergences(self) -> tuple[float, float]:
        r"""Divergences of P from Q and of Q from P, without a difference of large terms.

        With ν the eigenvalues of :math:`Q^{-1/2} (P - Q) Q^{-1/2}` they are
        :math:`½ \sum (ν - \log(1 + ν))` and :math:`½ \sum (\log(1 + ν) - ν / (1 + ν))`. Of
        small ν three powers are enough, whose sums are products of the matrix.
        """
        pair = self.pair
        matrix = relative_difference(pair.exact.to_dense(), pair.approx.to_dense(), self)
        if float(matrix.norm()) <= SERIES:
            square = matrix @ matrix
            powers = matrix.square().sum(), (matrix * square).sum(), square.square().sum()
            second, third, fourth = (float(power) / 2 for power in powers)
            forward = second / 2 - third / 3 + fourth / 4
            return forward, second / 2 - 2 * third / 3 + 3 * fourth / 4
        what = f"{pair.approx!r} relative to {pair.exact!r}"
        values = factorised("eigvalsh", matrix, what)
        logs = values.log1p()
        back = (logs - values / (1 + values)).sum()
        return 0.5 * float((values - logs).sum()), 0.5 * float(back)

    @cached_property
    def logdets(self) -> tuple[float, float]:
        """Log det P and log det Q."""
        first = self.pair.exact.logdet(self.damping)
        if self.pair.same:
            return first, first
        own = self.inverses.approx
        if isinstance(own, IterativeInverse) and self.pair.rows > DENSE_ROWS:
            return first, -own.factor.logdet()  # of which traces and solves are made, too
        return first, self.pair.approx.logdet(self.damping)

    @cached_property
    def trace(self) -> float:
        """Tr Q⁻¹P = ⟨Q⁻¹, F⟩ + λ tr Q⁻¹."""
        inverse = self.inverses.approx
        return inverse.inner(self.pair.exact) + self.damping * inverse.trace()

    @cached_property
    def reverse_trace(self) -> float:
        """Tr P⁻¹Q = ⟨P⁻¹, F̂⟩ + λ tr P⁻¹."""
        inverse = self.inverses.exact
        return inverse.inner(self.pair.approx) + self.damping * inverse.trace()

    def solve(self, w: Float[Tensor, "*k o i"]) -> Float[Tensor, "*k o i"]:
        """Return Q⁻¹w, by an inverse in closed form or a factor where one was made."""
        made = vars(self).get("inverses")
        own = None if made is None else made.approx
        factored = isinstance(own, IterativeInverse) and "factor" in vars(own)
        if own is not None and (factored or isinstance(own, Eigenform)):
            return own @ w
        return self.pair.approx.solve(w, self.damping)

    def form(self, w: Float[Tensor, "o i"]) -> float:
        """Return ⟨w, P w⟩."""
        inside = float(self.pair.exact.quadratic_form(w))
        return inside + self.damping * float(w.square().sum())

    def along(
        self, gradient: Float[Tensor, "o i"], best: Float[Tensor, "o i"] | None = None
    ) -> "Step":
        """Return the update directions of a gradient."""
        v = weight(gradient, self.pair.exact)
        first = self.pair.exact.solve(v, self.damping) if best is None else best
        same = self.pair.same
        taken = first if same else self.pair.approx.solve(v, self.damping)
        return Step(self, v, first, taken)


def weight(given: object, operator: Operator) -> Float[Tensor, "o i"]:
    """Return a gradient or a direction in float64.

    Raises
    ------
    ValueError
        For what is no real tensor of the shape of the operator's weight.
    """
    if isinstance(given, Tensor) and not given.is_complex():
        if given.shape == operator.weight_shape:
            return given.to(torch.float64)
        told = f"a tensor of shape {tuple(given.shape)}"
    else:
        told = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
    raise ValueError(
        f"{operator!r}: {told} was given as gradient or direction, a real tensor of shape "
        f"{operator.weight_shape} is expected; `stats[name].pack` makes it from parameters."
    )


def require_operator(metric: str, given: object) -> None:
    """Refuse what is no matrix of this package.

    Raises
    ------
    TypeError
        Saying how to make one.
    """
    if not isinstance(given, Operator):
        raise TypeError(
            f"{metric}: {type(given).__name__} was given, an operator is expected, as "
            "fl.KFAC()(stats[name]) returns it; fl.Dense(matrix, (d_out, d_in)) makes one "
            "of a tensor."
        )


@final
@dataclass(frozen=True, eq=False)
class Step:
    """The exact direction p* = P⁻¹v and the one that is taken, p_Q = Q⁻¹v.

    Raises
    ------
    NumericalError
        If squares of one of them are no numbers.
    """

    damped: Damped
    gradient: Float[Tensor, "o i"]
    best: Float[Tensor, "o i"]
    taken: Float[Tensor, "o i"]

    def __post_init__(self) -> None:
        """Look at the largest entries."""
        for w in (self.gradient, self.best, self.taken):
            most = float(w.abs().max()) if w.numel() else 0.0
            if 0 < most < SMALLEST or most > LARGEST:
                raise NumericalError(
                    f"{self.damped.pair.exact!r} with damping {self.damped.damping:.3g}: "
                    f"a gradient or step has entries up to {most:.3g}, whose squares "
                    "are no numbers of float64. Scale the data or the outputs, or change "
                    "the damping."
                )

    @cached_property
    def curvature(self) -> float:
        """⟨p_Q, P p_Q⟩, one product."""
        return self.damped.form(self.taken)

    @cached_property
    def plain_curvature(self) -> float:
        """⟨v, P v⟩, one product."""
        return self.damped.form(self.gradient)


def paired(metric: str, exact: Operator, approx: Operator, mixed: bool) -> Pair:
    """Check that two operators may be compared and take them to float64.

    Raises
    ------
    ValueError
        If shapes differ, or Fisher types differ without `mixed`.
    TypeError
        For what is no operator.
    """
    for given in (exact, approx):
        require_operator(metric, given)
    if exact.weight_shape != approx.weight_shape:
        raise ValueError(
            f"{metric}: {exact!r} acts on weights of shape {exact.weight_shape}, "
            f"{approx!r} on {approx.weight_shape}."
        )
    kinds = exact.provenance.fisher, approx.provenance.fisher
    if not mixed and all(kinds) and kinds[0] != kinds[1]:
        raise ValueError(
            f"{metric}: one operator comes from the Fisher {kinds[0]}, the other from "
            f"{kinds[1]}. Pass mixed=True if that is meant."
        )
    one, other = exact.to(torch.float64), approx.to(torch.float64)
    if isinstance(one, FactoredFisher) and isinstance(other, FactoredFisher):
        same = one.samples is other.samples and one.count == other.count
    else:
        same = exact is approx
    if same:
        return Pair(one, one)
    single = approx.dtype != torch.float64 and _rests_on_bases(approx)
    floor = SINGLE_FLOOR if single else FLOOR
    if one.shape[0] > RESIDUAL_ROWS:
        return Pair(one, other, floor)
    return Pair(_settled(one), _settled(other), floor, other)


def _settled(operator: Operator) -> Operator:
    """Return a sum that its terms hide as the dense matrix, in which nothing cancels."""
    if isinstance(operator, Stacked):
        return replace(operator, parts=tuple(map(_settled, operator.parts)))
    if isinstance(operator, BlockDiagonal):
        blocks = {name: _settled(block) for name, block in operator.blocks.items()}
        return replace(operator, blocks=blocks)
    if isinstance(operator, KroneckerSum) and operator.cancels:
        return Dense(operator.to_dense(), operator.weight_shape, operator.provenance)
    return operator


def _rests_on_bases(operator: Operator) -> bool:
    """Whether an operator, or a part of it, is known in an orthonormal basis."""
    return isinstance(operator, ORTHONORMAL) or any(map(_rests_on_bases, _parts(operator)))


def _terms_norm(operator: Operator) -> float:
    """Return the size of the terms behind sums; 0 for what adds up nothing."""
    if isinstance(operator, KroneckerSum):
        return operator.terms_norm
    return math.hypot(*map(_terms_norm, _parts(operator)))


def _parts(operator: Operator) -> tuple[Operator, ...]:
    if isinstance(operator, BlockDiagonal):
        return tuple(operator.blocks.values())
    return operator.parts if isinstance(operator, Stacked) else ()
