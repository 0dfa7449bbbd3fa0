"""Many leading eigenvalues of a symmetric matrix that is given by its products."""

from typing import TYPE_CHECKING, Final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import NumericalError
from fisherlab.numerics.krylov import orthonormal
from fisherlab.numerics.linalg import factorised

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

BLOCK: Final = 16  # columns of a step: the basis is read once for all of them
GROWTH: Final = 1.15  # of the space between two looks at its eigenvalues
LARGEST: Final = 4  # times the eigenvalues wanted, and `SPARE` more: the largest space
SPARE: Final = 1000


def leading_sizes(
    products: "LinearOperator", k: int, what: str, tolerance: float
) -> Float[Tensor, " k"]:
    r"""Return the k largest :math:`|λ_i|` of a symmetric matrix, descending, in float64.

    Block Lanczos from fixed noise with every block orthogonal to all before it. With Q the
    basis, :math:`Q^T M Q = Y Θ Y^T` and :math:`R = M Q Y - Q Y Θ` there are k eigenvalues
    with :math:`\sum_i (λ_i - θ_i)^2 \le \|R\|^2`. Where that is at most
    ``tolerance² Σ θ_i²`` it goes on from new noise, which has what a space lacks of tied
    values, and ends where that changes nothing.

    Parameters
    ----------
    products
        The matrix M, of n rows.
    k
        How many.
    what
        The matrix in words, for errors.
    tolerance
        Relative, as above.

    Raises
    ------
    NumericalError
        If a space of 4 k + 1000 dimensions does not hold them.

    Notes
    -----
    For a space of m dimensions, mostly 2 k: m products, 8 n m² flops, m n numbers. ARPACK
    reads the whole basis for every product; a block of products reads it once.

    References
    ----------
    Golub & Underwood 1977; the bound is Kahan's, in Parlett 1998, section 11.5.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> products = aslinearoperator(np.diag([1.0, -5.0, 3.0]))
    >>> leading_sizes(products, 2, "it", 1e-10).round(decimals=9).tolist()
    [5.0, 3.0]
    """
    size = int(products.shape[0])
    most = min(size, LARGEST * k + SPARE)
    noise = torch.Generator().manual_seed(0)
    basis = torch.empty(most, size, dtype=torch.float64)  # a vector a row
    inner = torch.zeros(most, most, dtype=torch.float64)
    held, look, block = 0, min(3 * k // 2, most), basis.new_empty(size, 0)
    found = basis.new_zeros(k)
    while True:
        if not block.shape[1]:  # at the start, and where all of it is found
            drawn = torch.randn(size, BLOCK, generator=noise, dtype=torch.float64)
            block = _outside(basis[:held], drawn, basis[:held] @ drawn)
        block = block[:, : most - held]
        start, held = held, held + block.shape[1]
        basis[start:held] = block.T
        image = torch.from_numpy(products.matmat(block.numpy()))
        inside = basis[:held] @ image
        inner[:held, start:held] = inside
        inner[start:held, :start] = inner[:start, start:held].T
        block = _outside(basis[:held], image, inside)
        if held >= look:
            values, turn = factorised("eigh", inner[:held, :held], what)
            kept = values.abs().argsort(descending=True)[:k]
            before, found = found, values[kept].abs()
            rest = block.T @ image @ turn[start:held, kept]
            limit = tolerance * float(found.norm())
            small = float(rest.norm()) <= limit
            if held == size or (small and float((found - before).norm()) <= limit):
                return found
            if small:
                block = block[:, :0]
            if held == most:
                raise NumericalError(
                    f"{k} eigenvalues of {what}: a Krylov space of {held} dimensions does "
                    "not hold them. Ask for fewer, or form the matrix with `to_dense`."
                )
            look = min(int(GROWTH * held) + 4 * BLOCK, most)


def _outside(
    basis: Float[Tensor, "m n"], columns: Float[Tensor, "n b"], inside: Float[Tensor, "m b"]
) -> Float[Tensor, "n c"]:
    """Return an orthonormal basis of what columns have outside a space, `inside` in it.

    Normalising what is left magnifies its rounding, so that it is made orthogonal again.
    """
    block = orthonormal(columns - (inside.T @ basis).T)  # faster than basis.T @ inside
    return orthonormal(block - ((basis @ block).T @ basis).T)
