"""Block-diagonal matrices along a partition of one weight, their blocks formed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.linalg import (
    factorised,
    require_positive,
    stacked_cholesky,
)
from fisherlab.numerics.memory import chunks
from fisherlab.operators.base import PANEL_BYTES, Operator, Provenance, inner_product
from fisherlab.operators.bases import Turned
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.dense import Dense
from fisherlab.operators.eigenform import Eigenform
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.partition import Partition, same_partition


@final
@dataclass(frozen=True, eq=False, repr=False)
class MiniBlocks(Operator):
    r"""A block-diagonal matrix whose blocks are held.

    .. math:: M = P^T \mathrm{diag}(M_1, \ldots, M_B) P

    Parameters
    ----------
    partition
        Which entries form which block.
    blocks
        For each group of the partition a stack (B, k, k), or (1, k, k): one block that
        all B of the group share.

    Examples
    --------
    >>> op = MiniBlocks(Partition.by_row((2, 3)), (torch.eye(3).expand(2, 3, 3),))
    >>> op.trace()
    6.0
    """

    partition: Partition
    blocks: Sequence[Float[Tensor, "_ _ _"]]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.partition.weight_shape

    @property
    def stored_numbers(self) -> int:
        """Σ k(k+1)/2 over the blocks held; a shared one counts once."""
        return sum(len(b) * b.shape[1] * (b.shape[1] + 1) // 2 for b in self.blocks)

    @property
    def product_flops(self) -> int:
        """Σ k²."""
        return sum(count * size**2 for count, size in self.partition.sizes)

    def _tables(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group, blocks in zip(self.partition.groups, self.blocks, strict=True):
            yield group.to(blocks.device), blocks

    def _counted(self) -> Iterator[tuple[Tensor, int]]:
        """Yield each stack with how many times its blocks stand on the diagonal."""
        for (count, _), blocks in zip(self.partition.sizes, self.blocks, strict=True):
            yield blocks, count // max(len(blocks), 1)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        pairs = zip(self.partition.take(w), self.blocks, strict=True)
        return self.partition.assemble([_product(x, blocks) for x, blocks in pairs])

    def _dense(self) -> Float[Tensor, "p p"]:
        p = self.shape[0]
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        for group, blocks in self._tables():
            out[group[:, :, None], group[:, None, :]] = blocks.expand(len(group), -1, -1)
        return out

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        pairs = zip(self.partition.sizes, self.blocks, strict=True)
        parts = [b.diagonal(dim1=1, dim2=2).expand(*size)[None] for size, b in pairs]
        return self.partition.assemble(parts)[0]

    def trace(self) -> float:
        """Return the trace."""
        return sum(
            times * float(blocks.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))
            for blocks, times in self._counted()
        )

    def frobenius_norm(self) -> float:
        """Return √Σ‖block‖²."""
        total = 0.0
        for blocks, times in self._counted():
            norm = torch.linalg.vector_norm(blocks, dtype=torch.float64)
            total += times * float(norm) ** 2
        return total**0.5

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return the eigenvalues of all blocks, descending."""
        values = torch.cat([table.flatten() for table in self._spectra()])
        return values.sort(descending=True).values

    def _spectra(self) -> Iterator[Float[Tensor, "_ _"]]:
        for blocks, times in self._counted():
            values = factorised("eigvalsh", blocks.double(), self).to(self.dtype)
            yield values.repeat(times, 1)

    def eigenform(self) -> Eigenform:
        """Diagonalise block by block: coefficients in the order of the groups."""
        partition, pieces, tables = self.partition, [], []
        for (count, size), blocks in zip(partition.sizes, self.blocks, strict=True):
            found = factorised("eigh", blocks, self)
            pieces.append(found.eigenvectors)  # (1, k, k) for blocks that all share
            tables.append(found.eigenvalues.expand(count, size))

        def rotate(w: Tensor) -> Tensor:
            inside = zip(partition.take(w), pieces, strict=True)
            return torch.cat([_product(x, basis).flatten(1) for x, basis in inside], 1)

        def combine(c: Tensor) -> Tensor:
            runs = c.split([count * size for count, size in partition.sizes], 1)
            parts = [
                _product(run.unflatten(1, size), basis.mT)
                for run, size, basis in zip(runs, partition.sizes, pieces, strict=True)
            ]
            return partition.assemble(parts)

        basis = Turned(rotate, combine)
        return Eigenform(basis, tuple(tables), self.weight_shape, 0.0, self.provenance)

    def _solve(self, w: Float[Tensor, "k o i"], damping: Damping) -> Float[Tensor, "k o i"]:
        """Solve block by block, by Cholesky in float64."""
        damping = tikhonov(damping, self)
        taken = self.partition.take(w)
        parts = [torch.empty_like(x) for x in taken]
        for x, blocks, out in zip(taken, self.blocks, parts, strict=True):
            if len(blocks) == 1:
                out.copy_(_solved(x.double(), self._factor(blocks, damping)))
                continue
            for part in _panels(blocks):
                factor = self._factor(blocks[part], damping)
                out[:, part] = _solved(x[:, part].double(), factor).to(w.dtype)
        return self.partition.assemble(parts)

    def _factor(self, blocks: Tensor, damping: float) -> Tensor:
        """Return the float64 Cholesky factors of some damped blocks."""
        shifted = blocks.to(torch.float64, copy=True)
        shifted.diagonal(dim1=1, dim2=2).add_(damping)
        if not damping:
            values = factorised("eigvalsh", shifted, self).to(self.dtype)
            require_positive(values, damping, self)
        try:
            return stacked_cholesky(shifted, damping, self)
        except IndefiniteError as error:  # of some blocks; the smallest of all is told
            smallest = float(self.eigenvalues()[-1])
            raise IndefiniteError(repr(self), damping, smallest) from error

    def inverse(self, damping: Damping) -> "MiniBlocks":
        """Return the blockwise inverse, by Cholesky in float64.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        damping = tikhonov(damping, self)
        inverted = tuple(torch.empty_like(blocks) for blocks in self.blocks)
        for blocks, out in zip(self.blocks, inverted, strict=True):
            for part in _panels(blocks):
                out[part] = torch.cholesky_inverse(self._factor(blocks[part], damping))
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return MiniBlocks(self.partition, inverted, made)


def _panels(blocks: Tensor) -> Iterator[slice]:
    """Cut a stack so that its float64 copies stay within the workspace."""
    return chunks(len(blocks), PANEL_BYTES // (8 * blocks.shape[1] ** 2))


def _product(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply (n, B, k) with B blocks, or with the one that all share."""
    if len(blocks) == 1:
        return x @ blocks[0]
    return torch.einsum("nbk,bkl->nbl", x, blocks)


def _solved(x: Tensor, factor: Tensor) -> Tensor:
    """Solve with Cholesky factors of B blocks, or of the one that all share."""
    if len(factor) == 1:
        return torch.cholesky_solve(x.flatten(0, 1).T, factor[0]).T.reshape(x.shape)
    return torch.cholesky_solve(x.permute(1, 2, 0), factor).permute(2, 0, 1)


@inner_product(MiniBlocks, Dense)
def _blocks_dense(a: MiniBlocks, b: Dense) -> float:
    return sum(
        float((blocks * b.matrix[g[:, :, None], g[:, None, :]]).sum(dtype=torch.float64))
        for g, blocks in a._tables()
    )


@inner_product(MiniBlocks, KroneckerSum)
def _blocks_sum(a: MiniBlocks, b: KroneckerSum) -> float:
    d_in, total = a.weight_shape[1], 0.0
    for group, blocks in a._tables():
        o, i = group // d_in, group % d_in
        for g, x in b.terms:
            entries = g[o[:, :, None], o[:, None, :]] * x[i[:, :, None], i[:, None, :]]
            total += float((blocks * entries).sum(dtype=torch.float64))
    return total


@inner_product(MiniBlocks, MiniBlocks)
def _blocks_blocks(a: MiniBlocks, b: MiniBlocks) -> float:
    if not same_partition(a.partition, b.partition):
        return _blocks_dense(a, Dense(b.to_dense(), b.weight_shape))
    return sum(
        count / max(len(x), len(y)) * float((x * y).sum(dtype=torch.float64))
        for (count, _), x, y in zip(a.partition.sizes, a.blocks, b.blocks, strict=True)
        if count
    )
