"""Krylov spaces: singular triplets, eigenvalues, spectral quadrature, linear systems."""

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
    size = lengths(columns)
    columns = _without(_without(columns, against), against)
    kept = lengths(columns) > tiny * size
    for _ in range(2):
        columns = _orthonormalise(columns[:, kept])
        columns = _without(columns, against)
        kept = columns.norm(dim=0) > 0.5
    return columns[:, kept]


def lengths(columns: Float[Tensor, "r c"]) -> Float[Tensor, " c"]:
    """Return the lengths of columns from squares in float64, which float32 may not hold."""
    return torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)


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
    columns = columns / lengths(columns).to(columns.dtype)
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
    worst = float(lengths(rest).max() / values[0]) if keep else 0.0
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


def smallest_eigenvalue(
    products: "LinearOperator", what: str, tolerance: float, restarts: int = RESTARTS
) -> float:
    """Return the smallest eigenvalue, to a tolerance relative to the largest in size.

    It is searched as the largest of cI − M: next to 0 Lanczos converges there alone.

    Raises
    ------
    NumericalError
        If Lanczos does not converge.
    """
    from scipy.sparse.linalg import LinearOperator

    size = abs(float(extreme_eigenpairs(products, 1, "LM", what, 1e-3, restarts)[0]))
    shift = 1.01 * size
    turned = LinearOperator(
        products.shape, lambda x: shift * x - products.matvec(x), dtype=products.dtype
    )
    return shift - float(extreme_eigenpairs(turned, 1, "LA", what, tolerance, restarts)[0])


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


class Solution(NamedTuple):
    """A value with how it was reached."""

    value: Tensor
    converged: bool
    iterations: int
    residual: float
    positive: bool = True


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
) -> Solution:
    """Solve M x = b for symmetric positive definite M and a stack of b.

    Parameters
    ----------
    product
        x ↦ M x on stacks of shape (k, ...).
    right
        Right-hand sides, shape (k, ...); each is solved to its own residual.
    precondition
        x ↦ P x with P ≈ M⁻¹ symmetric positive definite; identity if None.
    start
        First guess; zero if None.
    tolerance
        Relative residual ‖b − M x‖ / ‖b‖ at which a system is done.
    max_iterations
        Products spent at most.

    Returns
    -------
    Solution
        value, converged, iterations, the largest relative residual, and whether every
        direction met had positive curvature (if not, M is indefinite).

    Examples
    --------
    >>> b = torch.ones(1, 3, dtype=torch.float64)
    >>> round(float(conjugate_gradients(lambda x: 2 * x, b).value[0, 0]), 6)
    0.5
    """
    precondition = precondition or (lambda x: x)
    sizes = _magnitudes(right)
    right = _scaled(right, 1 / sizes)
    start = None if start is None else _scaled(start, 1 / sizes)
    x = torch.zeros_like(right) if start is None else start.clone()
    residual = right - product(x) if start is not None else right.clone()
    scale = _norm(right).clamp_min(torch.finfo(right.dtype).tiny)
    z = precondition(residual)
    direction, energy = z.clone(), _dot(residual, z)
    used, rising = 0, torch.ones((), dtype=torch.bool, device=right.device)
    while True:
        active = _norm(residual) > tolerance * scale
        left, positive = torch.stack([active.any(), rising]).tolist()  # the only look
        if not left or not positive or used >= max_iterations:
            break
        image = product(direction)
        curvature = _dot(direction, image)
        rising = ((curvature > 0) | ~active).all()
        step = torch.where(active & rising, energy / curvature, 0)
        x += _scaled(direction, step)
        residual -= _scaled(image, step)
        z = precondition(residual)
        new = _dot(residual, z)
        ratio = torch.where(active, new / energy, 0)
        direction = z + _scaled(direction, ratio)
        energy, used = new, used + 1
    worst = float((_norm(residual) / scale).max()) if right.numel() else 0.0
    x = _scaled(x, sizes)
    return Solution(x, worst <= tolerance, used - (not positive), worst, positive)


def _magnitudes(stack: Float[Tensor, "k ..."]) -> Float[Tensor, " k"]:
    """Return the powers of two above the largest entries, which scale without rounding."""
    if not stack.numel():
        return stack.new_ones(len(stack))
    most = stack.flatten(1).abs().amax(1)
    part, _ = most.frexp()
    return torch.where(part > 0, most / part, 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _norm(a: Tensor) -> Tensor:
    return a.flatten(1).norm(dim=1)


def _scaled(a: Tensor, factors: Tensor) -> Tensor:
    return a * factors.view(-1, *[1] * (a.dim() - 1))
