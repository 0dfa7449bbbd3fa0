"""Eigendecompositions of a layer's factors: each made once, in the span of its samples.

KFAC and EKFAC decompose the same two factors, and so do methods of partial traces. Factors
that are sums over m rows of d numbers, m < d, act in the span of those rows: their m
eigenpairs cost m³ + m d² in place of d³, and all others are zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.codes import checksum
from fisherlab.numerics.linalg import eigh, factorised, narrowed, require_finite

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
