"""Extreme eigenpairs of products by ARPACK: the same call gives the same numbers."""

from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import NumericalError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def fixed_noise(size: int) -> Float[Tensor, " size"]:
    """Return the same normal numbers at every call.

    From a plain vector such as ones Lanczos can miss, or stop at once, where an
    eigenvector is orthogonal to it.

    >>> bool((fixed_noise(3) == fixed_noise(3)).all())
    True
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def extreme_eigenpairs(
    products: "LinearOperator",
    k: int,
    end: Literal["LA", "SA", "LM"],
    what: str,
    tolerance: float = 0.0,
    restarts: int | None = None,
) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Return k eigenvalues at one end, ascending, and their vectors, in float64.

    Both what Lanczos starts from and what it restarts from, where a Krylov space is
    exhausted as that of a matrix of low rank, is fixed noise. It gives up after so many
    `restarts`, 10 n by default.

    Raises
    ------
    NumericalError
        If the iteration does not converge, naming `what`.

    Examples
    --------
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> values, vectors = extreme_eigenpairs(aslinearoperator(np.eye(9)), 2, "LA", "I")
    >>> values.round(decimals=12)
    tensor([1., 1.], dtype=torch.float64)
    """
    from scipy.sparse.linalg import ArpackError, eigsh

    size = int(products.shape[0])
    start = fixed_noise(size).numpy()
    if not products.matvec(start).any():  # which ARPACK calls a bad starting vector
        return torch.zeros(k, dtype=torch.float64), torch.eye(size, k, dtype=torch.float64)
    options: dict[str, Any] = {"v0": start, "maxiter": restarts}
    if "rng" in signature(eigsh).parameters:  # scipy 1.17: unseeded where it is not given
        options["rng"] = np.random.default_rng(0)
    try:
        found = eigsh(products, k, which=end, tol=tolerance, **options)
    except ArpackError as error:
        raise NumericalError(
            f"{k} eigenvalues ({end}) of {what}: Lanczos gave up ({error}). "
            "Ask for fewer, or form the matrix with `to_dense`."
        ) from error
    values, vectors = (torch.from_numpy(np.asarray(part)) for part in found)
    order = values.argsort()
    return values[order], vectors[:, order]
