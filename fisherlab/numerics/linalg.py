"""The door to torch's factorisations: what fails is said, with the matrix by name.

KFAC and EKFAC decompose the same two factors, and so do methods of partial traces: within
`decomposed_once` each is decomposed once. Factors that are sums over m rows of d numbers,
m < d, act in the span of those rows: their m eigenpairs cost m³ + m d² in place of d³, and
all others are zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Num
from torch import Tensor

from fisherlab.codes import checksum
from fisherlab.errors import IndefiniteError, NumericalError


@final
@dataclass(frozen=True)
class Label:
    """Words about a value that are put together when they are read: in an error.

    Examples
    --------
    >>> print(Label("the row factor of {}", 3))
    the row factor of 3
    """

    words: str
    of: object

    def __str__(self) -> str:
        """Return the words with the value in its place."""
        return self.words.format(self.of)


def require_finite(values: Tensor, what: object) -> None:
    """Raise NumericalError if a value is NaN or infinite; one without storage is neither.

    Raises
    ------
    NumericalError
        Naming `what` and how many of its values are not finite.
    """
    if values.is_meta or not values.numel():
        return
    parts = values.abs() if values.is_complex() else values
    extremes = torch.stack(parts.aminmax())  # NaN where one is, without a table of truths
    if not bool(torch.isfinite(extremes).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise NumericalError(
            f"{what} holds {bad} of {values.numel()} values that are NaN or infinite. "
            "Look for them in the data and the weights first."
        )


def require_positive(
    values: Float[Tensor, "*b n"], damping: float, what: object, size: int | None = None
) -> None:
    """Raise unless damped symmetric matrices are positive definite: the one rule of it.

    With λ > 0 every eigenvalue plus λ is positive. Without damping the smallest exceeds
    ε·p·largest, ε of the precision of the values: below that it is rounding, and what a
    factorisation makes of it is luck. Blocks of a block-diagonal matrix count alone.

    Parameters
    ----------
    values
        Eigenvalues of one or more matrices, along the last axis.
    damping
        λ.
    what
        What is named: a text, or the operator, whose name is made where it is needed.
    size
        p, the length of the last axis if None.

    Raises
    ------
    NumericalError
        If a value is NaN or infinite.
    IndefiniteError
        Naming the smallest eigenvalue and the smallest damping that suffices.
    """
    if not values.numel():
        return
    require_finite(values, what)
    smallest, floor = values.amin(-1), torch.zeros_like(values[..., 0])
    if damping == 0:
        scale = torch.finfo(values.dtype).eps * (size or values.shape[-1])
        floor = scale * values.amax(-1).clamp_min(0)
    if not bool((smallest + damping > floor).all()):
        worst = (smallest - floor).argmin()
        least, level = (float(x.flatten()[worst]) for x in (smallest, floor))
        raise IndefiniteError(what, damping, least, level)


def damped_cholesky(
    matrix: Float[Tensor, "n n"], damping: float, what: object, *, overwrite: bool = False
) -> Float[Tensor, "n n"]:
    """Return the lower Cholesky factor of matrix + damping·I, in float64.

    With `overwrite` the damping may be added to the matrix that was given, which spares
    a copy of it.

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity.
    IndefiniteError
        If it is not positive definite; the smallest eigenvalue is named.
    """
    return _cholesky(matrix.to(torch.float64, copy=not overwrite), damping, what)


def damped_inverse(matrix: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return (matrix + damping·I)⁻¹ of a positive semidefinite matrix, in its precision.

    The matrix as it is stored fixes its inverse to ε·κ, κ ≤ tr/damping + 1. Where that is
    below √ε Cholesky in the same precision loses as much again, at a third of the time;
    else it is done in float64, and so where an entry of the inverse above 1/damping tells
    that the matrix has negative eigenvalues.

    Raises
    ------
    NumericalError
        If the damped matrix is not positive definite, or not finite.
    """
    lost = torch.finfo(matrix.dtype).eps ** 0.5
    if _well_damped(matrix, damping):
        factor, failed = torch.linalg.cholesky_ex(_shifted(matrix, damping))
        found = torch.cholesky_inverse(factor)
        if bool((failed == 0) & (found.diagonal().max() * damping <= 1 + lost)):
            return found
    factor = damped_cholesky(matrix, damping, "a factor")
    return torch.cholesky_inverse(factor).to(matrix.dtype)


def damped_triangle(matrix: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return the lower Cholesky factor of matrix + damping·I that its inverse is made of.

    It is in the precision of the matrix where `damped_inverse` is made in it, in float64
    otherwise: negative eigenvalues are told by a pivot below the damping.

    Raises
    ------
    NumericalError
        If the damped matrix is not positive definite, or not finite.
    """
    if _well_damped(matrix, damping):
        factor, failed = torch.linalg.cholesky_ex(_shifted(matrix, damping))
        least = damping * (1 - torch.finfo(matrix.dtype).eps ** 0.5)
        if bool((failed == 0) & (factor.diagonal().square().min() >= least)):
            return factor
    return damped_cholesky(matrix, damping, "a factor")


def _well_damped(matrix: Tensor, damping: float) -> bool:
    """Whether Cholesky in the precision of a matrix loses no more than its storage did."""
    lost = torch.finfo(matrix.dtype).eps ** 0.5
    return matrix.dtype.itemsize > 2 and 0 <= float(matrix.trace()) * lost < damping


def _shifted(matrix: Tensor, damping: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(damping)
    return shifted


def _cholesky(shifted: Tensor, damping: float, what: object) -> Tensor:
    """Add the damping to a matrix in place and return its lower Cholesky factor."""
    shifted.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if bool((info == 0) & torch.isfinite(factor[-1:]).all()):  # one look at the device
        return factor
    require_finite(shifted, f"{what} (damping {damping:g})")
    smallest = float(factorised("eigvalsh", shifted, what)[0]) - damping
    raise IndefiniteError(what, damping, smallest)


def stacked_cholesky(
    damped: Float[Tensor, "b n n"], damping: float, what: object
) -> Float[Tensor, "b n n"]:
    """Return the lower Cholesky factors of damped float64 matrices.

    Raises
    ------
    NumericalError
        If one holds NaN or infinity.
    IndefiniteError
        If one is not positive definite; the smallest eigenvalue is named.
    """
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool((info == 0).all() & torch.isfinite(factor[..., -1, :]).all()):
        return factor
    require_finite(damped, f"{what} (damping {damping:g})")
    smallest = float(factorised("eigvalsh", damped[info != 0], what).min()) - damping
    raise IndefiniteError(what, damping, smallest)


def eigh(
    matrix: Float[Tensor, "n n"], what: object
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return eigenvalues (ascending) and eigenvectors, computed in float64.

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity or the iteration fails.
    """
    require_finite(matrix, what)
    values, vectors = factorised("eigh", matrix.double(), what)
    return values.to(matrix.dtype), narrowed(vectors, matrix.dtype)


def factorised(
    kind: Literal["eigh", "eigvalsh", "inv", "qr", "slogdet", "solve", "svd", "svdvals"],
    matrix: Tensor,
    what: object,
    *rest: Tensor,
    **options: Any,
) -> Any:
    """Call a function of `torch.linalg` that factorises, and say what failed.

    In the precision of the matrix; one of half precision, which LAPACK does not know, is
    factorised in float32 and the result stays in it.

    Parameters
    ----------
    kind
        The function.
    matrix
        One matrix, or a stack of them.
    what
        What is named where it fails: a text, or the operator.
    rest, options
        Passed on.

    Raises
    ------
    NumericalError
        Naming the function, `what` and the remedy, in place of torch's LinAlgError.

    Examples
    --------
    >>> factorised("inv", torch.zeros(2, 2), "the zero matrix")
    Traceback (most recent call last):
    fisherlab.errors.NumericalError: inv of the zero matrix failed (linalg.inv: The \
diagonal element 1 is zero, the inversion could not be completed because the input matrix \
is singular). Give more damping, or statistics in float64.
    """
    wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    try:
        return getattr(torch.linalg, kind)(wide, *rest, **options)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        require_finite(wide, what)
        first = str(error).splitlines()[0].rstrip(".")
        raise NumericalError(
            f"{kind} of {what} failed ({first}). Give more damping, or statistics in "
            "float64."
        ) from error


def narrowed(basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a basis in another precision, numbers of no consequence as 0.

    Bases of nearly separate parts hold rounding errors of float64. In float32 their
    products with gradients end below the normal numbers, and processors multiply those
    many times slower. So what is below ε/n of the largest in its row of n, with the ε of
    the new precision, becomes 0: all of it together is less than one rounding error.

    Examples
    --------
    >>> narrowed(torch.tensor([[1.0, 1e-17]], dtype=torch.float64), torch.float32).tolist()
    [[1.0, 0.0]]
    """
    if basis.dtype == dtype or not basis.numel():
        return basis.to(dtype)
    sizes = basis.abs()
    floors = torch.finfo(dtype).eps / basis.shape[-1] * sizes.amax(-1, keepdim=True)
    return basis.masked_fill(sizes < floors, 0).to(dtype)


def entrywise_inner(a: Float[Tensor, "m n"], b: Float[Tensor, "m n"]) -> float:
    """Return Σ a_ij b_ij, summed in float64, a few rows of a large matrix at a time.

    Examples
    --------
    >>> entrywise_inner(torch.ones(2, 3), torch.ones(2, 3))
    6.0
    """
    rows = max(1, 2**21 // max(1, a.shape[1]))
    pieces = zip(a.split(rows), b.split(rows), strict=True)
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in pieces)


def compensated_sum(
    terms: Sequence[tuple[Float[Tensor, "o o"], Float[Tensor, "i i"]]],
) -> Float[Tensor, "p p"]:
    """Return Σ G ⊗ A in float64 as if rounded once, however much the terms cancel.

    Every product and every sum keeps what rounding takes from it (Dekker, Knuth). Costs
    some twenty operations an entry and term.

    Examples
    --------
    >>> one, tiny = torch.ones(1, 1).double(), torch.full((1, 1), 2.0**-30).double()
    >>> compensated_sum([(1e9 * one, one), (tiny, one), (-1e9 * one, one)]).item() * 2**30
    1.0
    """
    pairs = [(rows.double(), cols.double()) for rows, cols in terms]
    o, i = len(pairs[0][0]), len(pairs[0][1])
    out = pairs[0][0].new_empty(o, i, o, i)
    for row in range(o):
        total = lost = out.new_zeros(i, o, i)
        for rows, cols in pairs:
            a, b = rows[row][None, :, None].expand(i, o, i), cols[:, None].expand(i, o, i)
            product = a * b
            (a_top, a_low), (b_top, b_low) = _halves(a), _halves(b)
            missed = a_top * b_top - product + a_top * b_low + a_low * b_top + a_low * b_low
            found = total + product
            part = found - total
            lost = lost + missed + ((total - (found - part)) + (product - part))
            total = found
        out[row] = total + lost
    return out.view(o * i, o * i)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float64 numbers into 26 leading bits and the rest: products are exact."""
    shifted = (2**27 + 1) * x
    top = shifted - (shifted - x)
    return top, x - top


def kron(first: Num[Tensor, "a b"], second: Num[Tensor, "c d"]) -> Num[Tensor, "e f"]:
    """Return first ⊗ second, also of factors laid out unlike, which torch.kron refuses.

    Examples
    --------
    >>> kron(torch.ones(2, 3).T, torch.ones(4, 5)).shape
    torch.Size([12, 10])
    """
    return torch.kron(first.contiguous(), second.contiguous())


WORTH = 0.75  # share of d rows above which all of d costs no more
ROUNDED = 16  # ε of the rows: what lies further off their span is no rounding
Spectrum = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Span:
    """The space that m rows span, m < d.

    Parameters
    ----------
    rows
        (m, d), in the precision in which matrices are summed from them.
    """

    rows: Float[Tensor, "m d"]

    @cached_property
    def basis(self) -> Float[Tensor, "d m"]:
        """Orthonormal columns, in float64."""
        found: Tensor = factorised("qr", self.rows.double().T, "the rows of a factor").Q
        return found

    def spectrum(self, matrix: Float[Tensor, "d d"], what: object) -> Spectrum | None:
        """Return the eigenpairs of a matrix that acts in the span; None for another one."""
        turned = matrix @ self.basis
        outside = torch.addmm(matrix, turned, self.basis.T, alpha=-1).norm()
        if float(outside) > ROUNDED * torch.finfo(self.rows.dtype).eps * float(
            matrix.norm()
        ):
            return None
        inside = self.basis.T @ turned
        values, vectors = eigh((inside + inside.T) / 2, what)
        return values, self.basis @ vectors


@final
@dataclass(eq=False)
class _Made:
    spans: list[Span]
    known: dict[str, Spectrum] = field(default_factory=dict)

    def spectrum(self, matrix: Float[Tensor, "d d"], what: object) -> Spectrum:
        key = checksum(matrix)
        if key not in self.known:
            spans = (s for s in self.spans if s.rows.shape[1] == len(matrix))
            inside = (span.spectrum(matrix, what) for span in spans)
            found = next((one for one in inside if one is not None), None)
            self.known[key] = found or eigh(matrix, what)
        return self.known[key]


_MADE: ContextVar[_Made | None] = ContextVar("decompositions", default=None)


@contextmanager
def decomposed_once(*rows: Float[Tensor, "_ _"]) -> Iterator[None]:
    """Keep what `spectrum` finds, for equal matrices within the block of code.

    Parameters
    ----------
    rows
        Rows (m, d) whose span matrices may act in; used where m is well below d.
    """
    spans = [Span(one) for one in rows if len(one) <= WORTH * one.shape[1]]
    token = _MADE.set(_Made(spans))
    try:
        yield
    finally:
        _MADE.reset(token)


def spectrum(
    matrix: Float[Tensor, "d d"], what: object
) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
    """Return eigenvalues (ascending) and eigenvectors, computed in float64.

    All of them, or within `decomposed_once` those in the span of known rows, where the
    matrix is zero outside up to rounding.

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity or the iteration fails.

    Examples
    --------
    >>> rows = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    >>> with decomposed_once(rows):
    ...     values, vectors = spectrum(rows.T @ rows, "an outer product")
    >>> round(values.item()), tuple(vectors.shape)
    (25, (2, 1))
    """
    made = _MADE.get()
    if made is None:
        return eigh(matrix, what)
    require_finite(matrix, what)
    values, vectors = made.spectrum(matrix.double(), what)
    return values.to(matrix.dtype), narrowed(vectors, matrix.dtype)
