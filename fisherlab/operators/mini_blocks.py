"""Partitions of the entries of one weight, and matrices of formed blocks along them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.devices import chunks
from fisherlab.numerics.linalg import (
    factorised,
    require_positive,
    stacked_cholesky,
)
from fisherlab.operators.base import (
    PANEL_BYTES,
    Damping,
    Operator,
    Provenance,
    inner_product,
    tikhonov,
)
from fisherlab.operators.bases import Turned
from fisherlab.operators.dense import Dense
from fisherlab.operators.eigenform import Eigenform
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.showing import shown


@final
@dataclass(frozen=True)
class Run:
    """Blocks of `size` entries that follow each other in columns start:stop of each row.

    The blocks of fully connected layers and of convolutions are runs: no table of
    positions is held for them, and they are cut out of a weight without copying.
    """

    start: int
    stop: int
    size: int

    def table(self, weight_shape: tuple[int, int]) -> Int[Tensor, "b k"]:
        """Return the positions in ``vec(w)``, a block a row."""
        columns = positions(weight_shape)[:, self.start : self.stop]
        return columns.reshape(-1, self.size)


@shown
@final
@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """A partition of the entries of a weight into blocks, grouped by block size.

    Parameters
    ----------
    weight_shape
        (d_out, d_in).
    pieces
        Index tables (B, k), where row b lists the positions in ``vec(w)`` of block b, or
        runs of columns.

    Raises
    ------
    ValueError
        If an entry is named never or twice.

    Examples
    --------
    >>> Partition.by_row((2, 3)).groups[0].tolist()
    [[0, 1, 2], [3, 4, 5]]
    """

    weight_shape: tuple[int, int]
    pieces: Sequence[Int[Tensor, "_ _"] | Run]

    def __post_init__(self) -> None:
        """Check that the pieces name every entry once."""
        p = self.weight_shape[0] * self.weight_shape[1]
        if all(isinstance(piece, Run) for piece in self.pieces):
            named = self._columns_named()
            times = len(named) * self.weight_shape[0]
            once = sorted(named) == list(range(self.weight_shape[1]))
            distinct = len(set(named)) * self.weight_shape[0]
        else:
            flat = torch.cat([group.flatten() for group in self.groups])
            times, distinct = len(flat), len(torch.unique(flat))
            inside = not p or (int(flat.max()) < p and int(flat.min()) >= 0)
            once = times == distinct == p and inside
        if not once:
            raise ValueError(
                f"Partition of a weight of shape {self.weight_shape}: the groups name "
                f"{distinct} of {p} entries, {times} times in all. Every entry must be "
                "named once."
            )

    def __repr__(self) -> str:
        """Return one line: of what, how many blocks of which size."""
        blocks = ", ".join(f"{count} blocks of {size}" for count, size in self.sizes)
        return f"Partition({self.weight_shape}, {blocks})"

    def _columns_named(self) -> list[int]:
        named: list[int] = []
        for run in self.pieces:
            assert isinstance(run, Run)
            width = run.stop - run.start
            if run.size < 1 or width % run.size:
                msg = f"Partition: {width} columns cannot be cut into blocks of {run.size}."
                raise ValueError(msg)
            named += range(run.start, run.stop)
        return named

    @classmethod
    def by_row(cls, weight_shape: tuple[int, int]) -> "Partition":
        """Make one block per output: all its inputs and its bias."""
        return cls(weight_shape, (Run(0, weight_shape[1], weight_shape[1]),))

    @classmethod
    def by_column(cls, weight_shape: tuple[int, int]) -> "Partition":
        """Make one block per input: its weights to all outputs."""
        return cls(weight_shape, (positions(weight_shape).T.contiguous(),))

    @classmethod
    def by_kernel(
        cls, weight_shape: tuple[int, int], kernel: int, bias: bool
    ) -> "Partition":
        """Make one block per (output, input) kernel; biases are blocks of size one."""
        last = weight_shape[1] - bias
        runs = (Run(0, last, kernel), *((Run(last, last + 1, 1),) if bias else ()))
        return cls(weight_shape, tuple(run for run in runs if run.stop > run.start))

    @classmethod
    def by_label(
        cls, weight_shape: tuple[int, int], labels: Int[Tensor, "o i"]
    ) -> "Partition":
        """Make one block of all entries with the same label.

        Examples
        --------
        >>> tiles = torch.tensor([[0, 0, 1], [0, 0, 1]])
        >>> [g.tolist() for g in Partition.by_label((2, 3), tiles).groups]
        [[[2, 5]], [[0, 1, 3, 4]]]
        """
        if tuple(labels.shape) != weight_shape:
            raise ValueError(
                f"Partition.by_label: labels of shape {tuple(labels.shape)} were given "
                f"for a weight of shape {weight_shape}."
            )
        order = labels.flatten().argsort(stable=True)
        counts = torch.unique(labels, return_counts=True)[1]
        blocks = order.split(counts.tolist())
        sizes = sorted({len(block) for block in blocks})
        tables = [torch.stack([b for b in blocks if len(b) == size]) for size in sizes]
        return cls(weight_shape, tuple(tables))

    @property
    def groups(self) -> tuple[Int[Tensor, "_ _"], ...]:
        """The index tables (B, k), one for each size of block."""
        return tuple(
            piece.table(self.weight_shape) if isinstance(piece, Run) else piece
            for piece in self.pieces
        )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(B, k) of each group: how many blocks of which size."""
        o = self.weight_shape[0]
        return tuple(
            (o * (piece.stop - piece.start) // piece.size, piece.size)
            if isinstance(piece, Run)
            else (piece.shape[0], piece.shape[1])
            for piece in self.pieces
        )

    @property
    def is_by_row(self) -> bool:
        """Whether the blocks are the rows of the weight, in order."""
        i = self.weight_shape[1]
        first = self.pieces[0]
        return isinstance(first, Run) and first == Run(0, i, i)

    @property
    def stored_numbers(self) -> int:
        """Free numbers of all symmetric blocks."""
        return sum(count * size * (size + 1) // 2 for count, size in self.sizes)

    def take(self, w: Float[Tensor, "n o i"]) -> list[Float[Tensor, "n _ _"]]:
        """Cut weights into their blocks (n, B, k), group by group."""
        taken = []
        for piece, (count, size) in zip(self.pieces, self.sizes, strict=True):
            if isinstance(piece, Run):
                columns = w[:, :, piece.start : piece.stop]
                taken.append(columns.reshape(len(w), count, size))
            else:
                taken.append(w.flatten(1)[:, piece.to(w.device)])
        return taken

    def assemble(self, parts: Sequence[Float[Tensor, "n _ _"]]) -> Float[Tensor, "n o i"]:
        """Put blocks (n, B, k) back into weights: the inverse of `take`."""
        first = parts[0]
        if self.is_by_row:
            return first.reshape(len(first), *self.weight_shape)
        out = first.new_empty(len(first), *self.weight_shape)
        for piece, part in zip(self.pieces, parts, strict=True):
            if isinstance(piece, Run):
                columns = out[:, :, piece.start : piece.stop]
                columns.copy_(part.reshape(columns.shape))
            else:
                out.flatten(1)[:, piece.to(out.device)] = part
        return out


def positions(weight_shape: tuple[int, int]) -> Int[Tensor, "o i"]:
    """Return the position in ``vec(w)`` of every entry."""
    return torch.arange(weight_shape[0] * weight_shape[1]).view(weight_shape)


def same_partition(a: Partition, b: Partition) -> bool:
    """Tell whether two partitions list the same blocks in the same order."""
    if a is b or a.sizes != b.sizes:
        return a is b
    pairs = list(zip(a.pieces, b.pieces, strict=True))
    if all(isinstance(x, Run) and x == y for x, y in pairs):  # without any table
        return True
    return all(torch.equal(x, y) for x, y in zip(a.groups, b.groups, strict=True))


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
        made = self.provenance.inverted
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
