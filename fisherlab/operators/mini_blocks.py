"""Block-diagonal matrices along a partition of one weight, formed or held as samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.linalg import require_finite
from fisherlab.numerics.memory import chunks, parse_budget, require
from fisherlab.numerics.packed import weighted_moment
from fisherlab.operators.base import PANEL_BYTES, Operator, Provenance, inner_product
from fisherlab.operators.dense import CholeskyInverse, Dense
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.partition import Partition, same_partition
from fisherlab.samples import OuterSamples, Samples, rows


@final
@dataclass(frozen=True, eq=False, repr=False)
class MiniBlocks(Operator):
    """A block-diagonal matrix whose blocks are held.

    Parameters
    ----------
    partition
        Which entries form which block.
    blocks
        For each group of the partition a stack (B, k, k).

    Examples
    --------
    >>> op = MiniBlocks(Partition.by_row((2, 3)), (torch.eye(3).expand(2, 3, 3),))
    >>> op.trace()
    6.0
    """

    partition: Partition
    blocks: Sequence[Float[Tensor, "_ _ _"]]
    provenance: Provenance = Provenance()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.partition.weight_shape

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.blocks[0].device

    @property
    def stored_numbers(self) -> int:
        """Σ k(k+1)/2."""
        return self.partition.stored_numbers

    @property
    def product_flops(self) -> int:
        """Σ k²."""
        return sum(block.numel() for block in self.blocks)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group, blocks in zip(self.partition.groups, self.blocks, strict=True):
            yield group.to(blocks.device), blocks

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        flat, out = w.flatten(1), torch.empty_like(w.flatten(1))
        for group, blocks in self._pairs():
            out[:, group] = torch.einsum("nbk,bkl->nbl", flat[:, group], blocks)
        return out.view(w.shape)

    def _dense(self) -> Float[Tensor, "p p"]:
        p = self.shape[0]
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        for group, blocks in self._pairs():
            out[group[:, :, None], group[:, None, :]] = blocks
        return out

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        out = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
        for group, blocks in self._pairs():
            out[group] = blocks.diagonal(dim1=1, dim2=2)
        return out.view(self.weight_shape)

    def trace(self) -> float:
        """Return the trace."""
        return float(self.diagonal().sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return √Σ‖block‖²."""
        norms = (torch.linalg.vector_norm(b, dtype=torch.float64) for b in self.blocks)
        return sum(float(norm) ** 2 for norm in norms) ** 0.5

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return the eigenvalues of all blocks, descending."""
        values = [torch.linalg.eigvalsh(b.double()).flatten() for b in self.blocks]
        return torch.cat(values).sort(descending=True).values.to(self.dtype)

    def solve(self, w: Float[Tensor, "*k o i"], damping: float) -> Float[Tensor, "*k o i"]:
        """Return (M + damping·I)⁻¹ w, block by block.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        self._check(w, "solve")
        flat = w.reshape(-1, self.shape[0])
        out = torch.empty_like(flat)
        for (group, _), factor in zip(self._pairs(), self._factors(damping), strict=True):
            right = flat[:, group].permute(1, 2, 0).double()
            solved = torch.cholesky_solve(right, factor)
            out[:, group] = solved.permute(2, 0, 1).to(w.dtype)
        return out.view(w.shape)

    def _factors(self, damping: float) -> list[Tensor]:
        factors = []
        for blocks in self.blocks:
            shifted = blocks.double().clone()
            shifted.diagonal(dim1=1, dim2=2).add_(damping)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if bool((info > 0).any()) or not bool(torch.isfinite(factor).all()):
                require_finite(blocks, f"{self!r} (damping {damping:g})")
                raise IndefiniteError(repr(self), damping, float(self.eigenvalues()[-1]))
            factors.append(factor)
        return factors

    def inverse(self, damping: float) -> "MiniBlocks":
        """Return the blockwise inverse.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        factors = self._factors(damping)
        inverted = tuple(torch.cholesky_inverse(f).to(self.dtype) for f in factors)
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return MiniBlocks(self.partition, inverted, made)

    def to(self, dtype: torch.dtype) -> "MiniBlocks":
        """Return the matrix in another precision."""
        if dtype == self.dtype:
            return self
        return replace(self, blocks=tuple(block.to(dtype) for block in self.blocks))


@final
@dataclass(frozen=True, eq=False, repr=False)
class FactoredMiniBlocks(Operator):
    """The mini-blocks of an exact block, held as samples and formed on demand.

    Norms and inner products of per-row blocks go through N × N Gram matrices:
    ``‖M‖² = Σ_nm (a_n·a_m)² ⟨e_n, e_m⟩ / N²`` with e_n the output energies.
    """

    partition: Partition
    samples: Samples
    count: int
    provenance: Provenance = Provenance()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.partition.weight_shape

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.samples.dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.samples.device

    @property
    def stored_numbers(self) -> int:
        """Free numbers of the blocks it stands for."""
        return self.partition.stored_numbers

    @property
    def product_flops(self) -> int:
        """Σ k²."""
        return sum(len(g) * g.shape[1] ** 2 for g in self.partition.groups)

    @cached_property
    def formed(self) -> MiniBlocks:
        """The blocks themselves, formed at the first question that needs them."""
        numbers = sum(g.shape[0] * g.shape[1] ** 2 for g in self.partition.groups)
        require(
            numbers * self.dtype.itemsize,
            parse_budget(None, self.device),
            f"Forming the mini-blocks of {self!r}",
            "Norms and errors need no formed blocks.",
        )
        blocks: list[Tensor] = []
        for group in self.partition.groups:
            panels = [block for _, block in self._panels(group)]
            blocks.append(torch.cat(panels))
        return MiniBlocks(self.partition, tuple(blocks), self.provenance)

    def _panels(self, group: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the blocks of one group in panels that fit the workspace."""
        k = group.shape[1]
        for part in chunks(len(group), PANEL_BYTES // (k * k * self.dtype.itemsize)):
            yield part, self._form(group[part]) / self.count

    def _form(self, index: Int[Tensor, "b k"]) -> Float[Tensor, "b k k"]:
        if self.partition.is_by_row and isinstance(self.samples, OuterSamples):
            outputs = (index[:, 0] // self.weight_shape[1]).to(self.device)
            energy = self.samples.output_energy[:, outputs]
            return torch.stack(
                [weighted_moment(self.samples.inputs, one) for one in energy.T]
            )
        shape = (*index.shape, index.shape[1])
        total = torch.zeros(shape, dtype=self.dtype, device=self.device)
        place = index.to(self.device)
        for part in rows.parts(self.samples):
            chosen = rows.flat(self.samples, part)[:, place].permute(1, 2, 0)
            total.baddbmm_(chosen, chosen.transpose(1, 2))
        return total

    @property
    def _by_grams(self) -> bool:
        """Whether the norm is cheaper through Grams than through formed blocks."""
        if not (self.partition.is_by_row and isinstance(self.samples, OuterSamples)):
            return False
        o, i = self.weight_shape
        return self.samples.examples * (i + o) < o * i * i

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return self.formed._apply(w)

    def _dense(self) -> Float[Tensor, "p p"]:
        return self.formed.to_dense()

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal, that of the exact block."""
        return self.samples.squares() / self.count

    def trace(self) -> float:
        """Return the trace, that of the exact block."""
        return float(self.samples.squared_norms().sum(dtype=torch.float64)) / self.count

    def frobenius_norm(self) -> float:
        """Return √Σ‖block‖²."""
        return self._norm

    @cached_property
    def _norm(self) -> float:
        if not self._by_grams:
            return self._panel_norm()
        assert isinstance(self.samples, OuterSamples)
        energy, total = self.samples.output_energy, 0.0
        for left, right, inputs, _ in self.samples.squared_grams():
            weight = 1.0 if left == right else 2.0
            outputs = energy[left] @ energy[right].T
            total += weight * float((inputs * outputs).sum(dtype=torch.float64))
        return total**0.5 / self.count

    def _panel_norm(self) -> float:
        panels = (p for group in self.partition.groups for _, p in self._panels(group))
        return sum(float(p.square().sum(dtype=torch.float64)) for p in panels) ** 0.5

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return the eigenvalues of all blocks, descending."""
        return self.formed.eigenvalues()

    def solve(self, w: Float[Tensor, "*k o i"], damping: float) -> Float[Tensor, "*k o i"]:
        """Return (M + damping·I)⁻¹ w, block by block.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        return self.formed.solve(w, damping)

    def inverse(self, damping: float) -> MiniBlocks:
        """Return the blockwise inverse.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        return self.formed.inverse(damping)

    def to(self, dtype: torch.dtype) -> "FactoredMiniBlocks":
        """Return the matrix in another precision."""
        if dtype == self.dtype:
            return self
        return replace(self, samples=self.samples.to(dtype))


@inner_product(FactoredFisher, FactoredMiniBlocks)
def _factored_blocks(a: FactoredFisher, b: FactoredMiniBlocks) -> float:
    if a.samples is b.samples:
        return b.frobenius_norm() ** 2 * b.count / a.count
    return FactoredMiniBlocks(b.partition, a.samples, a.count).formed.inner(b.formed)


@inner_product(FactoredMiniBlocks, FactoredMiniBlocks)
def _factored_blocks_pair(a: FactoredMiniBlocks, b: FactoredMiniBlocks) -> float:
    if a.samples is b.samples and same_partition(a.partition, b.partition):
        return a.frobenius_norm() ** 2 * a.count / b.count
    return a.formed.inner(b.formed)


@inner_product(FactoredMiniBlocks, Operator)
def _formed_any(a: FactoredMiniBlocks, b: Operator) -> float:
    return a.formed.inner(b)


@inner_product(MiniBlocks, Dense)
def _blocks_dense(a: MiniBlocks, b: Dense) -> float:
    return sum(
        float((blocks * b.matrix[g[:, :, None], g[:, None, :]]).sum(dtype=torch.float64))
        for g, blocks in a._pairs()
    )


@inner_product(MiniBlocks, CholeskyInverse)
def _blocks_inverse(a: MiniBlocks, b: CholeskyInverse) -> float:
    return _blocks_dense(a, b.whole)


@inner_product(MiniBlocks, KroneckerSum)
def _blocks_sum(a: MiniBlocks, b: KroneckerSum) -> float:
    d_in, total = a.weight_shape[1], 0.0
    for group, blocks in a._pairs():
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
        float((x * y).sum(dtype=torch.float64))
        for x, y in zip(a.blocks, b.blocks, strict=True)
    )
