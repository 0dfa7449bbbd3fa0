"""Multiply-adds and bytes that exact blocks, methods and their numbers take."""

from dataclasses import dataclass
from typing import final

from fisherlab.approximators import (
    CGFAC,
    KPSVD,
    Approximator,
    Deflation,
    Diagonal,
    ExactBlock,
    KFACCorrected,
    MiniBlock,
)
from fisherlab.approximators.costs import EIGEN, building_flops
from fisherlab.approximators.kpsvd.position_gram import PositionGram, position_bytes
from fisherlab.approximators.kpsvd.rearranged import Rearranged
from fisherlab.approximators.kpsvd.solvers import choose
from fisherlab.catalogue import Needs
from fisherlab.numerics.decompositions import WORTH
from fisherlab.numerics.packed import pair_count
from fisherlab.operators.factored import KEPT_BLOCK, ROUNDS, FactoredFisher
from fisherlab.operators.kronecker import DENSE_ROWS
from fisherlab.samples import OuterSamples, Samples, SharedSamples

READ = 20  # multiply-adds in the time that one number takes from memory
SWEEPS = 4  # times that norms, traces and diagonals of one cell read the samples
EFFORT = 10  # products of block Krylov steps over those of the power steps that are counted
TERM_READS = 25  # of the factors of one term, until its errors are known
STEP_READS = 25  # of a column in a step of a Krylov space
STEPS_TO_TOLERANCE = 150  # of conjugate gradients without a preconditioner, about
STEPS = 8  # of a Krylov space before it is restarted
CHECKS = 300  # products that look for the smallest eigenvalue of a large sum, about
BATCHED = 8  # what factorisations of many small blocks lose to one large product
NUMBER = 8  # bytes

ITERATED = (KPSVD, Deflation, KFACCorrected)


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
    # The inverse itself, and by the Gram the samples in its coordinates.
    if by_gram(s):
        return work + Work(EIGEN * m**3 + m * m * p, 2 * NUMBER * m * p)
    return work + Work(p**3 / 2, 3 * NUMBER * p**2)


def _terms(method: Approximator) -> int:
    rank = int(getattr(method, "rank", 1))
    return rank + isinstance(method, KFACCorrected)


def own(s: Samples, method: Approximator, part: Needs) -> Work:
    """Return what one method takes beside what is shared."""
    if isinstance(method, ExactBlock):
        return Work(0)
    if part == "matrix":
        read = SWEEPS * _reading(s) + _factor_reading(s, method)
        return Work(_building(s, method) + _inner(s, method) + read, space(s, method))
    if part == "gradient":  # two quadratic forms of the exact block beside the solve
        return solve(s, method) + Work(2 * product(s))
    return solve(s, method) + against_inverse(s, method)


def _building(s: Samples, method: Approximator) -> float:
    counted = building_flops(method, s) or 0
    if not isinstance(method, ITERATED):
        return counted
    by_gram = isinstance(s, OuterSamples) and method.solver == "auto"
    return counted * (1 if by_gram else EFFORT)


def _factor_reading(s: Samples, method: Approximator) -> float:
    """Count the readings of Kronecker factors, which take longer than what is done."""
    if isinstance(method, (Diagonal, MiniBlock)):
        return 0.0
    o, i = s.weight_shape
    reads, terms = TERM_READS * _terms(method), _terms(method)
    if isinstance(method, ITERATED) and not isinstance(s, OuterSamples):
        reads += STEP_READS * STEPS * (terms + 1)
    made_positive = _decomposing(s) if isinstance(method, ITERATED) else 0
    return READ * reads * (o * o + i * i) + made_positive


def space(s: Samples, method: Approximator) -> float:
    """Return the bytes of the Krylov space of the pairs of a shared layer."""
    if not isinstance(method, ITERATED) or isinstance(s, OuterSamples):
        return 0.0
    rank, auto = _terms(method), isinstance(method, KPSVD) and method.solver == "auto"
    if auto and isinstance(choose(Rearranged(s, s.examples), rank), PositionGram):
        return position_bytes(s, rank)
    o, i = s.weight_shape
    longer, shorter = max(o, i) ** 2, min(o, i) ** 2
    return (rank + 1) * STEPS * (longer + 2 * shorter) * s.dtype.itemsize


def _inner(s: Samples, method: Approximator) -> float:
    o, i, m, p = _sizes(s)
    if isinstance(method, Diagonal):
        return s.examples * p
    if isinstance(method, MiniBlock):
        outer = isinstance(s, OuterSamples)
        return s.examples**2 * (i + o) if outer else m * p * i
    return _terms(method) * s.form_flops()


def solve(s: Samples, method: Approximator) -> Work:
    """Count one solve at one damping, with all that it takes beforehand."""
    return prepared(s, method) + Work(one_more(s, method))


def prepared(s: Samples, method: Approximator) -> Work:
    """Count what the solves at all dampings share: blocks, and eigendecompositions."""
    o, i, _, p = _sizes(s)
    if isinstance(method, (Diagonal, CGFAC)) or _by_examples(s, method):
        return Work(0)
    if isinstance(method, MiniBlock):
        return Work(s.examples * p * i, 2 * NUMBER * o * i * i)
    if _terms(method) < 2 or not isinstance(method, ITERATED):
        return Work(_decomposing(s))
    if p <= DENSE_ROWS:
        return Work(EIGEN * p**3, 3 * NUMBER * p * p)
    return Work(CHECKS * _terms(method) * p * (o + i))


def one_more(s: Samples, method: Approximator) -> float:
    """Count a solve at a damping more."""
    o, i, _, p = _sizes(s)
    if isinstance(method, Diagonal):
        return p
    if isinstance(method, CGFAC):
        iterations = min(STEPS_TO_TOLERANCE, method.max_iterations or STEPS_TO_TOLERANCE)
        return iterations * _cg_product(s, method)
    if _by_examples(s, method):
        n = s.examples
        return n * n * i + o * (BATCHED * n**3 / 3 + n * n + 2 * n * i)
    if isinstance(method, MiniBlock):
        return o * (BATCHED * i**3 / 3 + i * i)
    return 2.0 * p * sum(widths(s)) + solved_again(s, method)


def widths(s: Samples) -> tuple[int, int]:
    """Return how many eigenvectors both factors have: no more than the rows they sum up."""
    o, i, m, _ = _sizes(s)
    if not isinstance(s, (OuterSamples, SharedSamples)):
        return o, i
    rows, cols = m * s.positions, s.examples * s.positions
    return (rows if rows <= WORTH * o else o), (cols if cols <= WORTH * i else i)


def _decomposing(s: Samples) -> float:
    """Count the eigenvectors of both factors: all, or those in the span of few samples."""
    return sum(
        EIGEN * d**3
        if width == d
        else 2 * d * d * width + 6 * d * width**2 + EIGEN * width**3
        for d, width in zip(s.weight_shape, widths(s), strict=True)
    )


def _cg_product(s: Samples, method: CGFAC) -> float:
    """Count a product of CG-FAC, through the rows of its factors or the samples."""
    if method.variant == "exact":
        return product(s)
    _, _, m, p = _sizes(s)
    return 2.0 * s.positions * (m + s.examples) * p


def _by_examples(s: Samples, method: Approximator) -> bool:
    """Return whether mini-blocks are solved through examples fewer than their rows."""
    outer = isinstance(method, MiniBlock) and isinstance(s, OuterSamples)
    return outer and s.examples < s.weight_shape[1]


def solved_again(s: Samples, method: Approximator) -> float:
    """Count a solve of many weights by conjugate gradients; 0 for what is factorised."""
    o, i, _, p = _sizes(s)
    terms = _terms(method)
    if terms < 2 or not isinstance(method, ITERATED):
        return 0.0
    return ROUNDS * 2 * terms * p * (o + i)


def against_inverse(s: Samples, method: Approximator) -> Work:
    """Return ⟨P⁻¹, Q⁻¹⟩ and ‖Q⁻¹‖; by the Gram with the samples in its coordinates."""
    work = _inverse_inner(s, method)
    _, _, m, p = _sizes(s)
    return work + Work(m * m * p if by_gram(s) else 0)


def formed_inverse(s: Samples) -> Work:
    """Count the Cholesky factor of a dense block and its inverse."""
    p = s.weight_shape[0] * s.weight_shape[1]
    return Work(p**3, 4 * NUMBER * p * p)


def _inverse_inner(s: Samples, method: Approximator) -> Work:
    o, i, m, p = _sizes(s)
    columns = m if by_gram(s) else 0
    if isinstance(method, MiniBlock):
        formed = Work(BATCHED * o * i**3, 2 * NUMBER * o * i * i)
        return formed + Work(columns * p * i)
    if _terms(method) > 1 and isinstance(method, ITERATED):
        return formed_inverse(s) + Work(2 * columns * p * p)
    dense = 0 if columns else 3 * NUMBER * p * p
    return Work(2 * columns * p * sum(widths(s)), dense)
