"""Multiply-adds and bytes that exact blocks, methods and their numbers take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from fisherlab.approximators import KPSVD, Approximator
from fisherlab.approximators.base import (
    EIGEN,
    Returned,
    building_flops,
    facts,
    held_numbers,
)
from fisherlab.approximators.exact import DIRECT
from fisherlab.approximators.kpsvd_choice import in_tables
from fisherlab.approximators.rearranged import position_bytes
from fisherlab.catalogue import Needs
from fisherlab.numerics.linalg import WORTH
from fisherlab.numerics.packed import pair_count
from fisherlab.operators.factored import KEPT_BLOCK, ROUNDS, FactoredFisher
from fisherlab.operators.factored_mini_blocks import CUT
from fisherlab.operators.kronecker import DENSE_ROWS
from fisherlab.samples import (
    OuterSamples,
    Samples,
    SharedSamples,
    TokenSamples,
    TurnedSamples,
)

READ = 20  # multiply-adds in the time that one number takes from memory
SWEEPS = 4  # times that norms, traces and diagonals of one cell read the samples
EFFORT = 10  # products of block Krylov steps over those of the power steps that are counted
TURNS = 2.5  # the same of a shared weight, for every product that is looked for
TERM_READS = 25  # of the factors of one term, until its errors are known
STEP_READS = 25  # of a column in a step of a Krylov space
STEPS_TO_TOLERANCE = 150  # of conjugate gradients without a preconditioner, about
STEPS = 8  # of a Krylov space before it is restarted
CHECKS = 300  # products that look for the smallest eigenvalue of a large sum, about
WORKING = 4  # copies of a factor while it is made positive and symmetric
COPIES = 6  # of a factor, with its eigenvectors and the work of LAPACK
BATCHED = 8  # what factorisations of many small blocks lose to one large product
NUMBER = 8  # bytes


@final
@dataclass(frozen=True)
class Work:
    """Multiply-adds, and bytes held at once.

    Examples
    --------
    >>> (Work(2, 8) + Work(3, 4)).flops
    5
    """

    flops: float
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Add the flops; of the bytes the larger count."""
        return Work(self.flops + other.flops, max(self.bytes, other.bytes))


def _sizes(s: Samples) -> tuple[int, int, int, int]:
    """Return d_out, d_in, M = V·N and p."""
    o, i = s.weight_shape
    return o, i, s.total, o * i


def _reading(s: Samples) -> float:
    """Count one reading of the samples, which takes longer than what is done with it."""
    return READ * s.nbytes / s.dtype.itemsize


def product(s: Samples) -> float:
    """Count a product with the exact block, which reads the samples twice."""
    return s.product_work() + 2 * _reading(s)


def _block(s: Samples) -> FactoredFisher:
    return FactoredFisher(s, s.examples)


def norm(s: Samples) -> float:
    """Count ‖F‖, and once more the table of the noise floor where it is not kept."""
    o, i, m, p = _sizes(s)
    if isinstance(s, OuterSamples):
        outputs = min(pair_count(o), s.columns**2 * o)
        return s.examples**2 * (i + outputs) / 2 + m * o * o / 2
    gram = s.gram_flops()
    return gram + (min(gram, s.dense_flops()) if p <= KEPT_BLOCK else gram)


def by_gram(s: Samples) -> bool:
    """Return whether the samples are fewer than the rows of their exact block."""
    return _block(s).uses_gram


def _inversion(s: Samples) -> Work:
    """Return what factorising the damped exact block takes."""
    _, _, m, p = _sizes(s)
    if by_gram(s):
        return Work(s.gram_flops() + m**3 / 3, 2 * NUMBER * m**2)
    return Work(s.dense_flops() + p**3 / 3, 3 * NUMBER * p**2)


def shared(s: Samples, part: Needs) -> Work:
    """Return what all methods of a layer share: the exact norm, direction or inverse."""
    _, _, m, p = _sizes(s)
    if part == "matrix":
        return Work(norm(s))
    work = _inversion(s)
    if part == "gradient":
        block = _block(s)
        return Work(ROUNDS * product(s)) if block.iterates else work
    if by_gram(s):
        return work + Work(EIGEN * m**3)
    return work + Work(p**3 / 2, 3 * NUMBER * p**2)


def traced(s: Samples) -> Work:
    """Return what divergences take of the exact block: its determinant, and tr P⁻¹."""
    return _inversion(s) + Work(s.total**3) if by_gram(s) else shared(s, "damping")


def has_factors(s: Samples) -> bool:
    """Return whether products with samples are made of their factors."""
    s = s.upright if isinstance(s, TurnedSamples) else s
    return isinstance(s, (OuterSamples, SharedSamples))


def widths(s: Samples) -> tuple[int, int]:
    """Return how many eigenvectors both factors have: no more than the rows they sum up."""
    o, i = s.weight_shape
    rows, cols = s.factor_rows()
    return (rows if rows <= WORTH * o else o), (cols if cols <= WORTH * i else i)


def _decomposing(s: Samples) -> float:
    """Count the eigenvectors of both factors: all, or those in the span of few samples."""
    return sum(
        EIGEN * d**3
        if width == d
        else 2 * d * d * width + 6 * d * width**2 + EIGEN * width**3
        for d, width in zip(s.weight_shape, widths(s), strict=True)
    )


def formed_inverse(s: Samples) -> Work:
    """Count the Cholesky factor of a dense block and its inverse."""
    p = s.weight_shape[0] * s.weight_shape[1]
    return Work(p**3, 4 * NUMBER * p * p)


@dataclass(frozen=True)
class Factors:
    """A product of factors, or what is diagonal in their bases: counts of one cell.

    Parameters
    ----------
    samples
        Those of the exact block.
    method
        The approximator.
    """

    samples: Samples
    method: Any

    @property
    def terms(self) -> int:
        """How many products are added up."""
        return 1

    def matrix(self) -> Work:
        """Count building it, ⟨F, F̂⟩ and the readings of samples and factors."""
        read = SWEEPS * _reading(self.samples) + self.reading()
        return Work(self.building() + self.inner() + read, self.space())

    def gradient(self) -> Work:
        """Count a solve, and two quadratic forms of the exact block beside it."""
        return self.solve() + Work(2 * product(self.samples))

    def damping(self) -> Work:
        """Count a solve, ⟨P⁻¹, Q⁻¹⟩ and ‖Q⁻¹‖."""
        return self.solve() + self.against_inverse()

    def solve(self) -> Work:
        """Count one solve at one damping, with all that it takes beforehand."""
        return self.prepared() + Work(self.one_more())

    def building(self) -> float:
        """Count what the approximator says of itself."""
        return building_flops(self.method, self.samples) or 0

    def reading(self) -> float:
        """Count the readings of factors, which take longer than what is done."""
        o, i = self.samples.weight_shape
        return READ * TERM_READS * self.terms * (o * o + i * i)

    def space(self) -> float:
        """Return the bytes held while it is built: eigenvectors, and work beside them."""
        s, told = self.samples, facts(self.method)
        sides = list(zip(s.weight_shape, widths(s), strict=True))
        if isinstance(s, TokenSamples) and told.needs_inputs:
            sides = sides[1:]  # the rows of a table keep their basis
        numbers = (
            COPIES * d * d if told.inverts or width == d else 2 * d * width
            for d, width in sides
        )
        return float(NUMBER * max(numbers)) if told.decomposes else 0.0

    def inner(self) -> float:
        """Count ⟨F, F̂⟩."""
        return self.terms * self.samples.form_flops()

    def prepared(self) -> Work:
        """Count what the solves at all dampings share."""
        return Work(_decomposing(self.samples))

    def one_more(self) -> float:
        """Count a solve at a damping more."""
        o, i = self.samples.weight_shape
        return 2.0 * o * i * sum(widths(self.samples))

    def further(self, formed: bool) -> float:
        """Count a solve at the same damping, `formed` where its traces were asked for."""
        return 2.0 * Factors.one_more(self)

    def divergences(self) -> Work:
        """Count ⟨F, Q⁻¹⟩ and ⟨P⁻¹, F̂⟩: of a product by tables, as samples have factors."""
        inside, m = self.inner(), self.samples.total
        told = facts(self.method)
        factors = told.result in ("factors", "terms") and not told.decomposes
        if not (factors and self._columns and has_factors(self.samples)):
            return self.against_inverse() + Work(inside)
        tables = 2 * self.samples.gram_flops() + m * m + self._turning()
        return Work(inside + self.terms * tables, 2 * NUMBER * m * m)

    def _turning(self) -> float:
        """Count the products of all inputs and output gradients with matrices."""
        (o, i), (rows, cols) = self.samples.weight_shape, self.samples.factor_rows()
        return float(rows * o * o + cols * i * i)

    def against_inverse(self) -> Work:
        """Count ⟨P⁻¹, Q⁻¹⟩ and ‖Q⁻¹‖; by the Gram with samples in its coordinates."""
        _, _, m, p = _sizes(self.samples)
        return self.inverse_inner() + Work(m * self._columns * p)

    def inverse_inner(self) -> Work:
        """Count ⟨P⁻¹, Q⁻¹⟩ once the exact inverse is there."""
        _, _, _, p = _sizes(self.samples)
        if not self._columns:
            return Work(0, 3 * NUMBER * p * p)
        if has_factors(self.samples):
            return Work(self._turning())
        return Work(2 * self._columns * p * sum(widths(self.samples)), self._stacked)

    @property
    def _stacked(self) -> float:
        """Bytes of the samples as matrices, in two coordinates."""
        o, i = self.samples.weight_shape
        return 2 * NUMBER * self._columns * o * i

    @property
    def _columns(self) -> int:
        return self.samples.total if by_gram(self.samples) else 0


@final
class Terms(Factors):
    """A sum of products by power or Krylov steps, solved together or iteratively."""

    @property
    def terms(self) -> int:
        """How many products are added up."""
        return int(self.method.terms)

    def building(self) -> float:
        """Count steps in tables, power steps, or Krylov steps of many more products."""
        if self._in_tables:
            return super().building()
        if not isinstance(self.samples, OuterSamples):
            turns = TURNS * self.terms if isinstance(self.method, KPSVD) else 2 * TURNS
            return super().building() * turns
        return super().building() * (1 if self.method.solver == "auto" else EFFORT)

    @property
    def _in_tables(self) -> bool:
        auto = isinstance(self.method, KPSVD) and self.method.solver == "auto"
        return auto and in_tables(self.samples, self.terms)

    def divergences(self) -> Work:
        """Count those of one product, or the inverse of the dense sum."""
        return super().divergences() if self.terms < 2 else self.against_inverse()

    def reading(self) -> float:
        """Count the readings of factors, of a Krylov space, and the making positive."""
        o, i = self.samples.weight_shape
        outer = isinstance(self.samples, OuterSamples)
        steps = 0 if outer else STEP_READS * STEPS * (self.terms + 1)
        return (
            super().reading() + READ * steps * (o * o + i * i) + _decomposing(self.samples)
        )

    def space(self) -> float:
        """Return the bytes of a Krylov space, of a shared layer, or of a pair in work."""
        s = self.samples
        s = s.of_seen() if isinstance(s, TokenSamples) else s
        pair = float(WORKING * max(s.weight_shape) ** 2 * s.dtype.itemsize)
        return pair if isinstance(s, OuterSamples) else max(pair, self._krylov(s))

    def _krylov(self, s: Samples) -> float:
        if self._in_tables:
            return position_bytes(s, self.terms)
        o, i = s.weight_shape
        longer, shorter = max(o, i) ** 2, min(o, i) ** 2
        return (self.terms + 1) * STEPS * (longer + 2 * shorter) * s.dtype.itemsize

    def prepared(self) -> Work:
        """Count eigendecompositions, of the dense sum while it is small."""
        o, i, _, p = _sizes(self.samples)
        if self.terms < 2:
            return super().prepared()
        if p <= DENSE_ROWS:
            return Work(EIGEN * p**3, 3 * NUMBER * p * p)
        return Work(CHECKS * self.terms * p * (o + i))

    def one_more(self) -> float:
        """Count a solve at a damping more."""
        return super().one_more() + self._again()

    def _again(self) -> float:
        """Count a solve of many weights by conjugate gradients; 0 for one product."""
        o, i, _, p = _sizes(self.samples)
        return ROUNDS * 2.0 * self.terms * p * (o + i) if self.terms > 1 else 0.0

    def further(self, formed: bool) -> float:
        """Count conjugate gradients, or a product with the inverse that was formed."""
        again, p = (
            self._again(),
            self.samples.weight_shape[0] * self.samples.weight_shape[1],
        )
        if formed and again:
            return min(again, 2.0 * p**2)
        return super().further(formed) + again

    def inverse_inner(self) -> Work:
        """Count the inverse of the dense sum beside its product."""
        if self.terms < 2:
            return super().inverse_inner()
        _, _, _, p = _sizes(self.samples)
        again = Work(2 * self._columns * p * p, self._stacked)
        return formed_inverse(self.samples) + again


@final
class Entries(Factors):
    """A diagonal."""

    def reading(self) -> float:
        """Count nothing: there are no factors."""
        return 0.0

    def inner(self) -> float:
        """Count the diagonal of the exact block."""
        o, i = self.samples.weight_shape
        return self.samples.examples * o * i

    def prepared(self) -> Work:
        """Count nothing."""
        return Work(0)

    def one_more(self) -> float:
        """Count a division an entry."""
        return float(self.samples.weight_shape[0] * self.samples.weight_shape[1])

    def further(self, formed: bool) -> float:
        """Count a division an entry."""
        return self.one_more()

    def inverse_inner(self) -> Work:
        """Count the diagonal of the exact inverse, a few rows at once, or columns of it."""
        *_, p = _sizes(self.samples)
        if not self._columns:
            return super().inverse_inner()
        columns = (
            self._columns if facts(self.method).entrywise else 2 * sum(widths(self.samples))
        )
        held = 0.0 if has_factors(self.samples) else self._stacked
        return Work(self._columns * columns * p, held)


@final
class Columns(Factors):
    """A matrix of low rank: its rows, and what they are to the exact block."""

    @property
    def _size(self) -> int:
        """The numbers of all columns."""
        *_, m, p = _sizes(self.samples)
        return min(self.method.rank, m, p) * p

    def reading(self) -> float:
        """Count the readings of the columns."""
        return float(READ * self._size)

    def space(self) -> float:
        """Return the bytes of the table whose eigenvalues are found, and of the columns."""
        *_, m, p = _sizes(self.samples)
        return float(NUMBER * (COPIES * min(m, p, DIRECT) ** 2 + 2 * self._size))

    def inner(self) -> float:
        """Count a product with the exact block for every column."""
        *_, p = _sizes(self.samples)
        return self._size / p * self.samples.product_work()

    def prepared(self) -> Work:
        """Count the products of the columns with one another."""
        *_, p = _sizes(self.samples)
        return Work(self._size**2 / p)

    def one_more(self) -> float:
        """Count a solve by what the columns add to 1/λ."""
        return 2.0 * self._size

    def further(self, formed: bool) -> float:
        """Count a solve by what the columns add to 1/λ."""
        return self.one_more()

    def inverse_inner(self) -> Work:
        """Count the columns times the exact inverse, by the Gram or dense."""
        *_, p = _sizes(self.samples)
        return Work(2.0 * self._size * (self._columns or p))


@final
class Blocks(Factors):
    """Blocks of rows, solved through their examples where those are fewer."""

    def reading(self) -> float:
        """Count nothing: there are no factors."""
        return 0.0

    def inner(self) -> float:
        """Count ⟨F, F̂⟩, through tables of examples for outer products."""
        o, i, m, p = _sizes(self.samples)
        outer = isinstance(self.samples, OuterSamples)
        return self.samples.examples**2 * (i + o) if outer else m * p * i

    @property
    def _by_examples(self) -> bool:
        outer = isinstance(self.samples, OuterSamples)
        apart = not getattr(self.method, "spatial_average", False)
        return outer and apart and self.samples.examples < self.samples.weight_shape[1]

    @property
    def _by_samples(self) -> bool:
        apart = not getattr(self.method, "spatial_average", False)
        few = self.samples.total < self.samples.weight_shape[1]
        return isinstance(self.samples, CUT) and apart and few

    def prepared(self) -> Work:
        """Count the dense blocks."""
        if self._by_examples or self._by_samples:
            return Work(0)
        o, i, _, p = _sizes(self.samples)
        return Work(self.samples.examples * p * i, 2 * NUMBER * o * i * i)

    def one_more(self) -> float:
        """Count the factorisations of all blocks, and a solve."""
        (o, i), n = self.samples.weight_shape, self.samples.examples
        if self._by_examples:
            return n * n * i + o * (BATCHED * n**3 / 3 + n * n + 2 * n * i)
        if self._by_samples:
            m = self.samples.total
            rows = o * (m * m * i + BATCHED * m**3 / 3 + 2 * m * i)
            return self.samples.form_flops() + rows
        return o * (BATCHED * i**3 / 3 + i * i)

    def further(self, formed: bool) -> float:
        """Count a solve with what is factorised, or all of it again."""
        if self._by_samples:
            return self.one_more()
        o, i = self.samples.weight_shape
        return 2.0 * o * i * i

    def divergences(self) -> Work:
        """Count ⟨F, Q⁻¹⟩, ⟨P⁻¹, F̂⟩ and the determinant, in the examples where few."""
        inverse = self.against_inverse() + Work(self.inner())
        if not self._by_examples:
            return inverse
        return inverse + Work(BATCHED * self._cubes / 3 + 2 * self._cubes + self._tables)

    @property
    def _cubes(self) -> float:
        return float(self.samples.weight_shape[0] * self.samples.examples**3)

    @property
    def _tables(self) -> float:
        """Count the products of weights of pairs of samples with their output gradients."""
        o, _, m, _ = _sizes(self.samples)
        return float(o * m * (m + READ * self.samples.examples))

    def against_inverse(self) -> Work:
        """Count ⟨P⁻¹, Q⁻¹⟩ and ‖Q⁻¹‖, in the examples where these are few."""
        if not (self._by_examples and self._columns):
            return super().against_inverse()
        o, _, m, _ = _sizes(self.samples)
        held = NUMBER * (2 * o * self.samples.examples**2 + 3 * m * m)
        gram = Work(self.samples.gram_flops(), held)
        return gram + Work((BATCHED + 4) * self._cubes + self._tables)

    def inverse_inner(self) -> Work:
        """Count the inverse blocks."""
        o, i, _, p = _sizes(self.samples)
        formed = Work(BATCHED * o * i**3, 2 * NUMBER * o * i * i)
        return formed + Work(self._columns * p * i, self._stacked)


@final
class Products(Factors):
    """What is known by its products alone: CG-FAC."""

    def prepared(self) -> Work:
        """Count nothing."""
        return Work(0)

    def one_more(self) -> float:
        """Count the products of conjugate gradients."""
        iterations = STEPS_TO_TOLERANCE
        return min(iterations, self.method.max_iterations or iterations) * self._product()

    def _product(self) -> float:
        """Count a product, through the rows of the factors or the samples."""
        if self.method.variant == "exact":
            return product(self.samples)
        _, _, m, p = _sizes(self.samples)
        return 2.0 * self.samples.positions * (m + self.samples.examples) * p


_FORMS: Mapping[Returned, type[Factors]] = {
    "factors": Factors,
    "terms": Terms,
    "blocks": Blocks,
    "columns": Columns,
    "entries": Entries,
    "products": Products,
}


def counted(s: Samples, method: Approximator) -> Factors:
    """Return the counts of one cell, by what the method returns.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> samples = OuterSamples(torch.ones(9, 4), torch.ones(2, 9, 3))
    >>> counted(samples, fl.Diagonal()).one_more()
    12.0
    """
    return _FORMS[facts(method).result](s, method)


def space(s: Samples, method: Any) -> float:
    """Return the bytes held while a method is built; the exact block is the samples."""
    exact = facts(method).result == "exact"
    return 0.0 if exact else counted(s, method).space()


def room(s: Samples, method: Any) -> int:
    """Return the bytes that a method's numbers take, as made and in float64, or its space.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> samples = OuterSamples(torch.ones(9, 4), torch.ones(2, 9, 3))
    >>> room(samples, fl.KFAC()), room(samples.to(torch.float64), fl.KFAC())
    (300, 200)
    """
    numbers, size = held_numbers(method, s), s.dtype.itemsize
    double = 0 if size == NUMBER else NUMBER
    working = max(numbers * double, int(space(s, method)))
    return numbers * size + working


def own(s: Samples, method: Approximator, part: Needs) -> Work:
    """Return what one method takes beside what is shared."""
    if facts(method).result == "exact":
        return Work(0)
    cell = counted(s, method)
    return {"matrix": cell.matrix, "gradient": cell.gradient}.get(part, cell.damping)()
