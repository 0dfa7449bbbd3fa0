"""Gauss quadrature of a spectral measure by Lanczos' recurrence."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import eigh, require_finite

REST = 1e2  # of ε: a remainder this small ends the recurrence, the space is invariant


def gauss_nodes(
    product: Callable[[Tensor], Tensor], start: Float[Tensor, " p"], steps: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    r"""Return nodes θ and weights w of the measure :math:`\sum_j (u_j^T z)^2 δ_{λ_j}`.

    .. math:: \sum_j w_j f(θ_j) = z^T f(M) z

    for every polynomial f of degree below 2k, for z of length one; for every f where k is
    the number of distinct eigenvalues that z meets, at which the recurrence ends.

    Parameters
    ----------
    product
        Of a symmetric M with a vector.
    start
        z, of any length but 0.
    steps
        The most nodes.

    Raises
    ------
    NumericalError
        If a product is not finite.

    Notes
    -----
    A product a step; every vector is orthogonalised against all earlier ones, twice, so
    steps · p numbers are held.

    References
    ----------
    Golub & Meurant 2010, "Matrices, Moments and Quadrature", chapter 6.

    Examples
    --------
    >>> values = torch.tensor([1.0, 2.0, 2.0]).double()
    >>> nodes, weights = gauss_nodes(lambda x: values * x, torch.ones(3).double(), 9)
    >>> nodes.round(decimals=9).tolist(), weights.round(decimals=3).tolist()
    ([1.0, 2.0], [0.333, 0.667])
    """
    most = min(steps, len(start))
    basis = start.new_empty(most, len(start))
    table = start.new_zeros(most, most)
    basis[0] = start / start.norm()
    size = 0.0
    for k in range(most):
        image = product(basis[k])
        require_finite(image, "a product of Lanczos' recurrence")
        known = basis[: k + 1]
        table[k, k] = image @ basis[k]
        size = max(size, float(image.norm()))
        for _ in range(2):
            image = image - known.T @ (known @ image)
        left = float(image.norm())
        if k + 1 == most or left <= REST * torch.finfo(start.dtype).eps * size:
            table = table[: k + 1, : k + 1]
            break
        basis[k + 1] = image / left
        table[k, k + 1] = table[k + 1, k] = left
    nodes, vectors = eigh(table, "the matrix of Lanczos' recurrence")
    return nodes, vectors[0].square()
