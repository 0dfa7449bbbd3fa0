r"""Singular triplets of Σ_n G_n ⊗ A_n through two N × N tables of inner products.

The map takes V = Σ y_n A_n to Σ ⟨A_n, V⟩ G_n / N, in weights x = K_A y / N with the table
K_A = (⟨A_n, A_m⟩); its adjoint takes weights x to y = K_G x / N. A matrix of weights y has
the squared length yᵀ K_A y. So one product with each table gives an image, its length, the
singular value, and what comes back: everything else is free. Where terms
(Σ r_n G_n) ⊗ (Σ c_n A_n) are taken off the sum, 1/N becomes 1/N − Σ r cᵀ. Tables hold
squares, so singular values below 1e-7 of the largest are not told from rounding errors.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.krylov import Triplets
from fisherlab.numerics.linalg import factorised
from fisherlab.numerics.packed import HalfTable, PositionTable

Table = Float[Tensor, "n n"] | HalfTable | PositionTable
EPS = torch.finfo(torch.float64).eps
SPACE = "the Gram matrix of a Krylov space"
CHECKED = 2  # blocks between two looks at the residuals
FRESH = 1e-3  # columns of which orthogonalisation leaves less are multiplied anew


@dataclass(frozen=True, eq=False)
class GramMap:
    """The two tables of inner products, and N.

    Parameters
    ----------
    right, left
        K_A and K_G, symmetric positive semidefinite up to rounding; whole or by halves.
    count
        N, the divisor of the sum.
    removed
        Weights (r, c), as columns, of the terms that are taken off.
    """

    right: Table
    left: Table
    count: int
    removed: tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]] | None = None

    def double(self) -> "GramMap":
        """Return the tables in float64, with the rounding errors that they have."""
        return replace(self, right=self.right.double(), left=self.left.double())

    def image(self, ky: Tensor) -> Tensor:
        """Return the weights of the image of V = Σ y_n A_n, from K_A y."""
        if self.removed is None:
            return ky / self.count
        rows, cols = self.removed
        return ky / self.count - rows @ (cols.T @ ky)

    def back(self, kx: Tensor) -> Tensor:
        """Return the weights of what the adjoint makes of U = Σ x_n G_n, from K_G x."""
        if self.removed is None:
            return kx / self.count
        rows, cols = self.removed
        return kx / self.count - cols @ (rows.T @ kx)


def gram_power(
    maps: GramMap, start: Float[Tensor, " n"], tolerance: float, max_iterations: int
) -> Triplets:
    """Return the leading triplet by power iteration, two products a step.

    From nonnegative weights, with tables of squares, all iterates stay nonnegative.

    Parameters
    ----------
    maps
        The tables.
    start
        Weights of the first right vector.
    tolerance
        Of ‖Zᵀu − σv‖ / σ.
    max_iterations
        Steps at most.

    Examples
    --------
    >>> tables = GramMap(torch.eye(2).square(), torch.diag(torch.tensor([9.0, 1.0])), 1)
    >>> found = gram_power(tables, torch.ones(2), 1e-6, 100)
    >>> round(found.values[0].item(), 4)
    3.0
    """
    y, image, used = start, maps.right @ start, 0
    while True:
        used += 1
        length = _lengths(y, image)
        if not float(length) > 0:
            return _none(start[:, None])
        y, image = y / length, image / length  # v of length 1, and K_A v
        x = maps.image(image)
        kx = maps.left @ x
        value = _lengths(x, kx)
        if not float(value) > 0:
            return _none(start[:, None])
        following = maps.back(kx) / value
        after = maps.right @ following
        rest = _lengths(following - value * y, after - value * image)
        worst = float(rest / value)
        if worst <= tolerance or used >= max_iterations:
            found = (x / value)[:, None], value[None], y[:, None]
            return Triplets(*found, worst <= tolerance, used, worst)
        y, image = following, after


def gram_krylov(
    maps: GramMap,
    rank: int,
    start: Float[Tensor, "n b"],
    *,
    depth: int,
    tolerance: float,
    max_products: int,
) -> Triplets:
    """Return the `rank` leading triplets by block Krylov iteration, two products a block.

    Parameters
    ----------
    maps
        The tables, in float64.
    rank
        Triplets wanted; fewer come back where the numerical rank is smaller.
    start
        Weights of generic right vectors.
    depth
        Blocks of one Krylov space before a restart with its leading vectors.
    tolerance
        Of ‖Zᵀu − σv‖ / σ₁ for every triplet asked for.
    max_products
        Blocks multiplied at most.

    Examples
    --------
    >>> values = torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64)
    >>> tables = GramMap(torch.eye(3).double(), torch.diag(values), 1)
    >>> found = gram_krylov(
    ...     tables, 2, torch.eye(3).double(), depth=3, tolerance=1e-10, max_products=9
    ... )
    >>> [round(value, 6) for value in found.values.tolist()]
    [3.0, 2.0]
    """
    used, exhausted = 0, 0
    y, ky = start, maps.right @ start
    while True:
        basis = _Basis.of(min(depth, max_products - used), start)
        found, restart = _explored(maps, basis, (y, ky), rank, tolerance)
        used += basis.depth
        done = found.residual <= tolerance
        # a space may end early: the weights of a start hold more than they stand for
        exhausted += basis.is_exhausted
        if done or used >= max_products or exhausted > 3:
            return found._replace(converged=done, iterations=used)
        y, ky = restart


def _explored(
    maps: GramMap,
    basis: "_Basis",
    start: tuple[Tensor, Tensor],
    rank: int,
    tolerance: float,
) -> tuple[Triplets, tuple[Tensor, Tensor]]:
    """Fill a basis until its triplets are good enough; return them and how to go on."""
    (y, ky), width = start, start[0].shape[1]
    found = _none(y), start
    while basis.depth < basis.limit:
        y, ky = _orthonormal(maps, y, ky, basis)
        if not y.shape[1]:
            basis.is_exhausted = True
            return _ritz(maps, basis, rank, width) if basis.filled else found
        back = maps.back(maps.left @ maps.image(ky))
        kback = maps.right @ back
        basis.append(y, ky, back, kback)
        y, ky = back, kback
        if basis.depth % CHECKED == 0 or basis.depth == basis.limit:
            found = _ritz(maps, basis, rank, width)
            if found[0].residual <= tolerance:
                break
    return found


@dataclass(eq=False)
class _Basis:
    """Orthonormal right weights, their products with K_A, what comes back, and K_A of it.

    Parameters
    ----------
    room
        Columns for all blocks, four times.
    limit
        Blocks at most.
    filled, depth
        Columns and blocks in use.
    is_exhausted
        Whether no further block was to be found.
    wear
        By what projections have raised rounding errors since products were last taken.
    """

    room: tuple[Tensor, Tensor, Tensor, Tensor]
    limit: int
    filled: int = 0
    depth: int = 0
    is_exhausted: bool = False
    wear: float = 1.0

    @classmethod
    def of(cls, limit: int, start: Float[Tensor, "n b"]) -> "_Basis":
        """Return room for blocks like `start`."""
        n, width = start.shape
        y, ky, back, kback = start.new_empty(4, limit * width, n)
        return cls((y, ky, back, kback), limit)

    def append(self, *blocks: Tensor) -> None:
        """Add a block of columns to each of the four."""
        stop = self.filled + blocks[0].shape[1]
        for rows, block in zip(self.room, blocks, strict=True):
            rows[self.filled : stop] = block.T
        self.filled, self.depth = stop, self.depth + 1

    def columns(self) -> tuple[Tensor, ...]:
        """Return y, K_A y, what comes back and K_A of it, as columns."""
        return tuple(rows[: self.filled].T for rows in self.room)


def _orthonormal(
    maps: GramMap, y: Tensor, ky: Tensor, basis: _Basis
) -> tuple[Tensor, Tensor]:
    """Return columns orthonormal in K_A and to the basis, with their products."""
    size = _lengths(y, ky)
    held, kheld, _, _ = basis.columns()
    for _ in range(2 if basis.filled else 0):  # once is not enough
        share = kheld.T @ y
        y, ky = y - held @ share, ky - kheld @ share
    left = _lengths(y, ky)
    kept = (left > 1e3 * EPS * size) & _above_noise(maps, y, ky)
    y, ky = y[:, kept], ky[:, kept]
    basis.wear *= float((size[kept] / left[kept]).max()) if y.shape[1] else 1.0
    worn = basis.wear > 1 / FRESH  # an error of K_A y grows from block to block
    if worn:
        y, ky = _multiplied_anew(maps, y, basis)
        basis.wear = 1.0
    for _ in range(2):
        kept = _above_noise(maps, y, ky)
        y, ky = y[:, kept], ky[:, kept]
        if not y.shape[1]:
            break
        scale = _lengths(y, ky)
        y, ky = y / scale, ky / scale
        if worn:  # what scaling has raised
            y, ky = _multiplied_anew(maps, y, basis)
        values, turn = factorised("eigh", _symmetric(y.T @ ky), SPACE)
        strong = values > 1e2 * EPS * len(values)
        turn = turn[:, strong] * values[strong].rsqrt()
        y, ky = y @ turn, ky @ turn
    return y, ky


def _multiplied_anew(maps: GramMap, y: Tensor, basis: _Basis) -> tuple[Tensor, Tensor]:
    """Project rounding errors out of columns, and multiply them with K_A."""
    held, kheld, _, _ = basis.columns()
    y = y - held @ (kheld.T @ y)
    return y, maps.right @ y


def _above_noise(maps: GramMap, y: Tensor, ky: Tensor) -> Tensor:
    """Tell which columns have a length that is not rounding errors alone."""
    noise = 1e3 * EPS * maps.right.diagonal().sum() * y.square().sum(0)
    return (y * ky).sum(0) > noise


def _lengths(y: Tensor, ky: Tensor) -> Tensor:
    """Return (yᵀ K y)^½ of a column or of each."""
    return (y * ky).sum(0).clamp_min(0).sqrt()


def _ritz(
    maps: GramMap, basis: _Basis, rank: int, width: int
) -> tuple[Triplets, tuple[Tensor, Tensor]]:
    """Return the triplets within the basis, and the weights to start again with."""
    y, ky, back, kback = basis.columns()
    squares, turn = factorised("eigh", _symmetric(ky.T @ back), SPACE)
    values, turn = squares.clamp_min(0).sqrt().flip(0), turn.flip(1)
    strong = (values > values[0] * 10 * EPS**0.5) & (values > 0)
    values, turn = values[strong], turn[:, strong]
    keep = min(rank, len(values))
    over = turn[:, :keep] / values[:keep]
    right = y @ turn[:, :keep]
    left = maps.image(ky @ over)
    rest = back @ over - right * values[:keep]
    krest = kback @ over - ky @ turn[:, :keep] * values[:keep]
    # a square below 0 is rounding errors: its size is what is known of the residual
    worst = float((rest * krest).sum(0).abs().max().sqrt() / values[0]) if keep else 0.0
    found = Triplets(left, values[:keep], right, True, 0, worst)
    onward = turn[:, :width] / values[:width].square()
    return found, (back @ onward, kback @ onward)


def _symmetric(table: Tensor) -> Tensor:
    return (table + table.T) / 2


def _none(start: Tensor) -> Triplets:
    empty = start[:, :0]
    return Triplets(empty, start.new_zeros(0), empty, True, 0, 0.0)
