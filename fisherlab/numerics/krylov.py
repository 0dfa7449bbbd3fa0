"""Krylov spaces: leading singular triplets, extreme eigenpairs, spectral quadrature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import NumericalError
from fisherlab.numerics.linalg import eigh, factorised, require_finite

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Action = Callable[[Tensor], Tensor]
RESTARTS = 300  # of Lanczos, 20 products each, until it is given up
GRAM_ROWS = 2**20  # rows of a basis taken to float64, or to a triangle, at once
_THIN: Final = {"full_matrices": False}


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A map on columns, (c, k) to (r, k), and its adjoint."""

    apply: Action
    adjoint: Action


class Triplets(NamedTuple):
    """Singular triplets, largest first, and how they were reached."""

    left: Float[Tensor, "r k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "c k"]
    converged: bool
    iterations: int
    residual: float

    def within(self, tolerance: float) -> bool:
        """Tell whether the residual is within the tolerance, or is rounding alone.

        A product rounds to ε·σ₁ of its size, and a left vector is a product over σ: below
        ε·σ₁/σ no more products help.
        """
        if not len(self.values) or not float(self.values[-1]) > 0:
            return self.residual <= tolerance
        spread = float(self.values[0]) / float(self.values[-1])
        rounding = 8 * torch.finfo(self.values.dtype).eps * spread
        return self.residual <= max(tolerance, rounding)


def orthonormal(columns: Tensor, against: Sequence[Tensor] = ()) -> Tensor:
    """Return an orthonormal basis of the columns after removing earlier bases.

    Columns of which only rounding errors are left are dropped. Everything is done twice:
    once is not enough.
    """
    tiny = 1e3 * torch.finfo(columns.dtype).eps
    size = columns.norm(dim=0)
    columns = _without(_without(columns, against), against)
    kept = columns.norm(dim=0) > tiny * size
    for _ in range(2):
        columns = _orthonormalise(columns[:, kept])
        columns = _without(columns, against)
        kept = columns.norm(dim=0) > 0.5
    return columns[:, kept]


def _without(columns: Tensor, against: Sequence[Tensor]) -> Tensor:
    for basis in against:
        columns = columns - basis @ (basis.T @ columns)
    return columns


def _orthonormalise(columns: Tensor) -> Tensor:
    """Turn columns of length one by the eigenvectors of their Gram matrix, in float64.

    The Gram matrix holds squares: in float32 it loses every direction of which less than
    3e-3 is new, and a Krylov space without those does not converge.
    """
    if columns.shape[1] == 0:
        return columns
    columns = columns / columns.norm(dim=0)
    gram = columns.new_zeros(2 * columns.shape[1:], dtype=torch.float64)
    for part in columns.split(GRAM_ROWS):
        wide = part.double()
        gram.addmm_(wide.T, wide)
    values, vectors = factorised("eigh", gram, "the Gram matrix of a Krylov space")
    fine, coarse = torch.finfo(torch.float64).eps, torch.finfo(columns.dtype).eps
    strong = values > max(1e2 * fine, (1e2 * coarse) ** 2) * len(values)
    return columns @ (vectors[:, strong] * values[strong].rsqrt()).to(columns.dtype)


@dataclass(frozen=True, eq=False)
class Space:
    """A Krylov space of right vectors, with their images Z v and what comes back, ZᵀZ v.

    Parameters
    ----------
    bases, images, backs
        Blocks of columns; the bases are orthonormal.
    """

    bases: tuple[Tensor, ...] = ()
    images: tuple[Tensor, ...] = ()
    backs: tuple[Tensor, ...] = ()

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.bases)

    def extended(self, basis: Tensor, image: Tensor, back: Tensor) -> "Space":
        """Return the space with one more block."""
        return Space((*self.bases, basis), (*self.images, image), (*self.backs, back))

    def following(self) -> Tensor:
        """Return the next orthonormal block; no columns if the space is invariant."""
        return orthonormal(self.backs[-1], self.bases)


def block_krylov(
    linear: LinearMap,
    rank: int,
    start: Float[Tensor, "c b"],
    *,
    depth: int = 6,
    tolerance: float = 1e-10,
    max_products: int = 1000,
    floor: float = 0.0,
) -> Triplets:
    """Return the `rank` leading singular triplets of a linear map.

    Rayleigh-Ritz on the block Krylov space of `depth` blocks, restarted with its leading
    right vectors. Converged when ‖Zᵀu − σv‖ ≤ tolerance·σ₁ for every triplet asked for,
    or as small as rounding lets it become (`Triplets.within`).
    A block of b finds tied singular values up to multiplicity b.

    Parameters
    ----------
    linear
        The map.
    rank
        Triplets wanted; fewer come back where the numerical rank is smaller.
    start
        Generic right vectors, b ≥ 1 columns; depth 1 is subspace (power) iteration.
    max_products
        Pairs of block products spent at most.
    floor
        A map whose largest singular value stays at or below it is taken for zero: what
        is left of it is rounding errors, on which nothing converges.
    """
    used, width = 0, start.shape[1]
    if len(start) > GRAM_ROWS:  # of the longer side only the images are held, not three
        image = linear.apply(orthonormal(start))
        if len(image) < len(start):
            turned = LinearMap(linear.adjoint, linear.apply)
            found = block_krylov(
                turned,
                rank,
                image,
                depth=depth,
                tolerance=tolerance,
                max_products=max_products,
                floor=floor,
            )
            return found._replace(left=found.right, right=found.left)
    while True:
        space = _grown(linear, start, max(depth, 1))
        if not space.depth:
            return _none(linear, start)
        triplets, following = rayleigh_ritz(space, rank, width)
        used += max(depth, 1)
        lost = bool((triplets.values <= floor).all()) and used > max(depth, 1)
        if lost:
            return _none(linear, start)
        converged = triplets.within(tolerance)
        if converged or used >= max_products or following.shape[1] == 0:
            return triplets._replace(converged=converged, iterations=used)
        start = following


def _grown(linear: LinearMap, start: Tensor, depth: int) -> Space:
    """Build a space of at most `depth` blocks, fewer where it becomes invariant."""
    space = Space()
    block = orthonormal(start)
    while space.depth < depth and block.shape[1]:
        image = linear.apply(block)
        space = space.extended(block, image, linear.adjoint(image))
        if space.depth < depth:
            block = space.following()
    return space


def rayleigh_ritz(space: Space, rank: int, width: int) -> tuple[Triplets, Tensor]:
    """Return the triplets of a space and the block of `width` columns to go on with."""
    what = "the images of a Krylov space"
    _, values, turned = factorised("svd", _upright(space.images, what), what, **_THIN)
    turn = turned.T
    strong = values > values[0] * 10 * torch.finfo(values.dtype).eps
    strong &= values > 0
    values, turn = values[strong], turn[:, strong]
    keep = min(rank, len(values))
    kept, sizes = turn[:, :keep], values[:keep]
    right = _combined(space.bases, kept)
    left = _combined(space.images, kept / sizes)
    rest = _combined(space.backs, kept / sizes) - right * sizes
    worst = float(rest.norm(dim=0).max() / values[0]) if keep else 0.0
    triplets = Triplets(left, sizes, right, True, 0, worst)
    gone_on = _combined(space.backs, turn[:, :width] / values[:width] ** 2)
    return triplets, gone_on  # one more power step


def _upright(blocks: Sequence[Tensor], what: str) -> Tensor:
    """Return a matrix with the singular values and right vectors of blocks side by side.

    Of many rows it is their triangles: the whole is not held a second and a third time.
    In float32 the root of their Gram matrix in float64, which is as good, is faster.
    """
    if len(blocks[0]) <= GRAM_ROWS:
        return torch.cat(list(blocks), 1)
    parts = zip(*(block.split(GRAM_ROWS) for block in blocks), strict=True)
    if blocks[0].dtype == torch.float32:
        wide = (torch.cat(part, 1).double() for part in parts)
        gram = torch.stack([part.T @ part for part in wide]).sum(0)
        values, vectors = factorised("eigh", gram, what)
        return (vectors * values.clamp_min(0).sqrt()).T.float()
    each = (factorised("qr", torch.cat(part, 1), what, mode="r").R for part in parts)
    return torch.cat(list(each))


def _combined(blocks: Sequence[Tensor], turn: Float[Tensor, "k c"]) -> Tensor:
    """Return the product of blocks side by side with a matrix."""
    first, *others = zip(blocks, turn.split([b.shape[1] for b in blocks]), strict=True)
    total = first[0] @ first[1]
    for block, part in others:
        total.addmm_(block, part)
    return total


def _none(linear: LinearMap, start: Tensor) -> Triplets:
    left = linear.apply(start[:, :1])[:, :0]
    return Triplets(left, start.new_zeros(0), start[:, :0], True, 0, 0.0)


def fixed_noise(size: int) -> Float[Tensor, " size"]:
    """Return the same normal numbers at every call.

    From a plain vector such as ones Lanczos can miss, or stop at once, where an
    eigenvector is orthogonal to it.

    >>> bool((fixed_noise(3) == fixed_noise(3)).all())
    True
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")


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


def smallest_eigenvalue(products: "LinearOperator", what: str, tolerance: float) -> float:
    """Return the smallest eigenvalue, to a tolerance relative to the largest in size.

    It is searched as the largest of cI − M: next to 0 Lanczos converges there alone.

    Raises
    ------
    NumericalError
        If Lanczos does not converge.
    """
    from scipy.sparse.linalg import LinearOperator

    size = abs(float(extreme_eigenpairs(products, 1, "LM", what, 1e-3, RESTARTS)[0]))
    shift = 1.01 * size
    turned = LinearOperator(
        products.shape, lambda x: shift * x - products.matvec(x), dtype=products.dtype
    )
    return shift - float(extreme_eigenpairs(turned, 1, "LA", what, tolerance, RESTARTS)[0])


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
