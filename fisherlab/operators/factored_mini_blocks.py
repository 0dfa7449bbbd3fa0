"""The mini-blocks of an exact block, held as per-example gradients."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.devices import chunks, parse_budget, require
from fisherlab.numerics.linalg import Label, stacked_cholesky
from fisherlab.numerics.packed import mirror_, symmetric_product_, weighted_moment
from fisherlab.operators.base import (
    PANEL_BYTES,
    Damping,
    Operator,
    Provenance,
    finely,
    inner_product,
    tikhonov,
)
from fisherlab.operators.factored import FactoredFisher, WoodburyInverse
from fisherlab.operators.mini_block_inverses import RowwiseWoodbury, factors, rowwise_inner
from fisherlab.operators.mini_blocks import MiniBlocks, Partition, same_partition
from fisherlab.samples import MatrixSamples, OuterSamples, Samples, SharedSamples

CUT = SharedSamples, MatrixSamples  # whose rows are had without the other rows


@final
@dataclass(frozen=True, eq=False, repr=False)
class FactoredMiniBlocks(Operator):
    """The mini-blocks of an exact block, held as samples and formed on demand.

    Norms and inner products of per-row blocks go through N × N Gram matrices:
    ``‖M‖² = Σ_nm (a_n·a_m)² ⟨e_n, e_m⟩ / N²`` with e_n the output energies.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> blocks = fl.MiniBlock()(stats["weight"])
    >>> type(blocks).__name__, blocks.formed.to_dense().shape
    ('FactoredMiniBlocks', torch.Size([8, 8]))
    """

    partition: Partition
    samples: Samples
    count: int
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.partition.weight_shape

    @property
    def stored_numbers(self) -> int:
        """Free numbers of the blocks it stands for."""
        return self.partition.stored_numbers

    @property
    def product_flops(self) -> int:
        """Σ k²."""
        return sum(count * size**2 for count, size in self.partition.sizes)

    @cached_property
    def formed(self) -> MiniBlocks:
        """The blocks themselves, formed at the first question that needs them."""
        sizes = self.partition.sizes
        require(
            sum(count * size**2 for count, size in sizes) * self.dtype.itemsize,
            parse_budget(None, self.device),
            Label("Forming the mini-blocks of {}", self),
            "Norms and errors need no formed blocks.",
        )
        blocks: list[Tensor] = []
        for group, (count, size) in enumerate(sizes):
            stack = torch.empty(count, size, size, dtype=self.dtype, device=self.device)
            for part, formed in self._panels(group):
                stack[part] = formed
            blocks.append(stack)
        return MiniBlocks(self.partition, tuple(blocks), self.provenance)

    def _panels(self, group: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the blocks of one group in panels that fit the workspace."""
        count, size = self.partition.sizes[group]
        for part in chunks(count, PANEL_BYTES // (size * size * self.dtype.itemsize)):
            panel = self._zeros(part.stop - part.start, size, size)
            yield part, self._add(panel, group, part, 1 / self.count)

    def _add(
        self, out: Float[Tensor, "b k k"], group: int, part: slice, scale: float
    ) -> Float[Tensor, "b k k"]:
        """Add scale · Σ D_b D_bᵀ to some blocks of a group, in place."""
        outer = self._outer
        if outer is not None:
            energy = outer.output_energy[:, part] * scale
            for block, weights in zip(out, energy.T, strict=True):
                block.add_(weighted_moment(outer.inputs, weights))
            return out
        for stack in self.samples.stacks():
            chosen = self.partition.take(stack)[group][:, part].permute(1, 2, 0)
            out.baddbmm_(chosen, chosen.transpose(1, 2), alpha=scale)
        return out

    @property
    def _outer(self) -> OuterSamples | None:
        """The samples, where they are outer products and every block is a row's."""
        fits = self.partition.is_by_row and isinstance(self.samples, OuterSamples)
        return cast("OuterSamples", self.samples) if fits else None

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def shared(self) -> MiniBlocks:
        r"""Return one block per group, the mean of its blocks: spatial averaging.

        .. math:: M_b = \frac{1}{B} \sum_{b'} F_{b'}

        For the rows of a weight used at one position this is
        :math:`\frac{1}{N d_{out}} \sum_{n} \|g_n\|^2 a_n a_n^T`. It holds
        k(k+1)/2 numbers and costs one symmetric product.
        """
        blocks = [self._mean(group) for group in range(len(self.partition.sizes))]
        return MiniBlocks(self.partition, tuple(blocks), self.provenance)

    def _mean(self, group: int) -> Float[Tensor, "1 k k"]:
        count, size = self.partition.sizes[group]
        scale = 1 / (count * self.count)
        outer = self._outer
        if outer is not None:
            return weighted_moment(outer.inputs, outer.output_energy.sum(1))[None] * scale
        total = self._zeros(size, size)
        for stack in self.samples.stacks():
            cut = self.partition.take(stack)[group]
            symmetric_product_(total, cut.flatten(0, 1), scale)
        return mirror_(total)[None]

    def averaged_into(self, old: MiniBlocks, weight: float) -> MiniBlocks:
        """Return weight·old + (1 − weight)·self, forming no second set of blocks.

        Raises
        ------
        ValueError
            If the partitions differ.
        """
        if not same_partition(old.partition, self.partition):
            raise ValueError(f"average: {old!r} and {self!r} have different partitions.")
        blocks = []
        for group, held in enumerate(old.blocks):
            stack = held * weight
            count, size = self.partition.sizes[group]
            panel = PANEL_BYTES // (size * size * self.dtype.itemsize)
            for part in chunks(count, panel):
                self._add(stack[part], group, part, (1 - weight) / self.count)
            blocks.append(stack)
        return MiniBlocks(self.partition, tuple(blocks), self.provenance)

    @property
    def _by_grams(self) -> bool:
        """Whether the norm is cheaper through Grams than through formed blocks."""
        if self._outer is None:
            return False
        o, i = self.weight_shape
        return self.samples.examples * (i + o) < o * i * i

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
        return finely(FactoredMiniBlocks._summed_norm, self)

    def _summed_norm(self) -> float:
        outer = self._outer
        if outer is None or not self._by_grams:
            return self._panel_norm()
        energy, total = outer.output_energy, 0.0
        for left, right, inputs, _ in outer.squared_grams():
            weight = 1.0 if left == right else 2.0
            outputs = energy[left] @ energy[right].T
            total += weight * float((inputs * outputs).sum(dtype=torch.float64))
        return total**0.5 / self.count

    def _panel_norm(self) -> float:
        if _cuts_are_cheaper(self, self):
            return _by_cuts(self.partition, self.samples, self.samples) ** 0.5 / self.count
        groups = range(len(self.partition.sizes))
        panels = (p for group in groups for _, p in self._panels(group))
        return sum(float(p.square().sum(dtype=torch.float64)) for p in panels) ** 0.5

    @property
    def _rank(self) -> int | None:
        """Samples that span every row's block, where they are fewer than its rows."""
        samples, outer = self.samples, self._outer is not None
        if not (outer or (self.partition.is_by_row and isinstance(samples, CUT))):
            return None
        rank = samples.examples * (1 if outer else samples.columns)
        return rank if rank < self.weight_shape[1] else None

    def _require_damping(self, damping: float) -> None:
        """Refuse to invert singular blocks before they are formed."""
        if not damping and self._rank is not None:
            raise IndefiniteError(repr(self), damping, 0.0)

    def inverse(self, damping: Damping) -> Operator:
        """Return the damped inverse, block by block.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        shift = tikhonov(damping, self)
        self._require_damping(shift)
        if self._by_examples and shift > 0:
            return RowwiseWoodbury.of(self, self._rows, self.count, shift)
        return self.formed.inverse(damping)

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(M + damping·I), of few examples through their Grams.

        Raises
        ------
        NumericalError
            If a damped block is not positive definite.
        """
        shift = tikhonov(damping, self)
        if not (self._by_examples and shift > 0):
            return self.formed.logdet(damping)
        (o, i), n = self.weight_shape, self.samples.examples
        total = o * (i - n) * math.log(shift)
        for _, _, factor in factors(self, self._rows, self.count, shift):
            total += 2 * float(factor.diagonal(dim1=1, dim2=2).log().sum())
        return total

    @property
    def _by_examples(self) -> bool:
        return self._outer is not None and self._rank is not None

    @property
    def _rows(self) -> OuterSamples:
        return cast("OuterSamples", self.samples)

    def _solve(self, w: Float[Tensor, "k o i"], damping: Damping) -> Float[Tensor, "k o i"]:
        """Solve block by block, in the smaller space of each."""
        damping = tikhonov(damping, self)
        self._require_damping(damping)
        if damping < 0 or self._rank is None:
            return self.formed._solve(w, damping)
        outer = self._outer
        if outer is None:
            return self._solved_by_samples(w, damping)
        return self._solved_by_examples(outer, w, damping)

    def _solved_by_examples(
        self, samples: OuterSamples, w: Float[Tensor, "k o i"], damping: float
    ) -> Float[Tensor, "k o i"]:
        """Solve in the N examples: a row's block is B Bᵀ with B = Aᵀ E^½ / √N.

        (B Bᵀ + λI)⁻¹ w = (w − B (BᵀB + λI)⁻¹ Bᵀ w) / λ.
        """
        inputs, flat = samples.inputs.double(), w.double()
        out = torch.empty_like(flat)
        for part, root, factor in factors(self, samples, self.count, damping):
            seen = (flat[:, part] @ inputs.T * root).permute(1, 2, 0)  # (b, N, k)
            turned = torch.cholesky_solve(seen, factor).permute(2, 0, 1) * root
            out[:, part] = (flat[:, part] - turned @ inputs) / damping
        return out.to(w.dtype)

    def _solved_by_samples(
        self, w: Float[Tensor, "k o i"], damping: float
    ) -> Float[Tensor, "k o i"]:
        """Solve in the V·N samples: a row's block is B Bᵀ, B the row of all matrices."""
        samples, flat = self.samples, w.double()
        m, (o, i) = samples.total, self.weight_shape
        out = torch.empty_like(flat)
        for part in chunks(o, PANEL_BYTES // (8 * m * (i + m))):
            cut = _rows_of(samples, part).double() / self.count**0.5  # (b, M, i)
            inner = cut @ cut.mT
            inner.diagonal(dim1=1, dim2=2).add_(damping)
            factor = stacked_cholesky(inner, damping, self)
            here = flat[:, part].permute(1, 2, 0)  # (b, i, k)
            turned = torch.cholesky_solve(cut @ here, factor)
            out[:, part] = ((here - cut.mT @ turned) / damping).permute(2, 0, 1)
        return out.to(w.dtype)


def _rows_of(samples: Samples, part: slice) -> Float[Tensor, "b m i"]:
    """Return some rows of all matrices, a row of the weight first."""
    if isinstance(samples, SharedSamples):
        cut = SharedSamples(samples.inputs, samples.gradients[..., part]).matrices()
    else:
        cut = samples.matrices()[:, :, part]
    return cut.flatten(0, 1).transpose(0, 1)


@inner_product(FactoredFisher, FactoredMiniBlocks)
def _factored_blocks(a: FactoredFisher, b: FactoredMiniBlocks) -> float:
    return _factored_blocks_pair(FactoredMiniBlocks(b.partition, a.samples, a.count), b)


@inner_product(FactoredMiniBlocks, FactoredMiniBlocks)
def _factored_blocks_pair(a: FactoredMiniBlocks, b: FactoredMiniBlocks) -> float:
    aligned = same_partition(a.partition, b.partition)
    if a.samples is b.samples and aligned:
        return b.frobenius_norm() ** 2 * b.count / a.count
    left, right = a._outer, b._outer
    if aligned and left and right and a._by_grams and b._by_grams:
        return _by_tables(left, right) / (a.count * b.count)
    if aligned and _cuts_are_cheaper(a, b):
        return _by_cuts(a.partition, a.samples, b.samples) / (a.count * b.count)
    if a.product_flops > b.product_flops:  # the smaller blocks are cut out of the larger
        a, b = b, a
    within = FactoredMiniBlocks(a.partition, b.samples, b.count)
    total = 0.0
    for group in range(len(a.partition.sizes)):
        pairs = zip(a._panels(group), within._panels(group), strict=True)
        for (part, panel), (_, other) in pairs:
            product = panel.mul_(other)
            if not aligned:
                product *= _together(b.partition, a.partition.groups[group][part])
            total += float(product.sum(dtype=torch.float64))
    return total


@inner_product(WoodburyInverse, FactoredMiniBlocks)
def _woodbury_blocks(a: WoodburyInverse, b: FactoredMiniBlocks) -> float:
    """Return (tr M − tr (K + λI)⁻¹ D M Dᵀ / N) / λ, of few examples by their table."""
    if not (b._by_examples and isinstance(a.samples, OuterSamples)):
        return a.inner(b.formed)
    energies = b._rows.output_energy.double().T / b.count
    held = energies.diag_embed()
    inside = rowwise_inner(a.samples, a._coupling, b._rows.inputs.double(), held)
    return (b.trace() - inside / a.count) / a.damping


def _by_tables(left: OuterSamples, right: OuterSamples) -> float:
    """Return Σ (a_n·b_m)² ⟨e_n, f_m⟩ with the output energies e and f."""
    energy, other, total = left.output_energy, right.output_energy.T, 0.0
    for part in chunks(left.examples, PANEL_BYTES // (8 * max(1, right.examples))):
        table = (left.inputs[part] @ right.inputs.T).square_() * (energy[part] @ other)
        total += float(table.sum(dtype=torch.float64))
    return total


def _cuts_are_cheaper(a: FactoredMiniBlocks, b: FactoredMiniBlocks) -> bool:
    """Whether all pairs of samples cost less than the blocks of both."""
    m, k = (x.samples.total for x in (a, b))
    return m * k * a.shape[0] < (m + k) * a.product_flops


def _by_cuts(partition: Partition, left: Samples, right: Samples) -> float:
    """Return Σ_b Σ_mk ⟨D_mb, E_kb⟩²: no block is formed."""
    total = 0.0
    for stack in left.stacks():
        for others in right.stacks():
            pairs = zip(partition.take(stack), partition.take(others), strict=True)
            for one, other in pairs:  # (m, b, k) each
                table = one.transpose(0, 1) @ other.permute(1, 2, 0)
                total += float(table.square().sum(dtype=torch.float64))
    return total


def _together(partition: Partition, entries: Int[Tensor, "b k"]) -> Tensor:
    """Tell which pairs of entries stand in one block of a partition."""
    number = torch.empty(partition.weight_shape, dtype=torch.int64).flatten()
    first = 0
    for group in partition.groups:
        number[group.cpu()] = torch.arange(first, first + len(group))[:, None]
        first += len(group)
    own = number[entries.cpu()]
    return (own[:, :, None] == own[:, None, :]).to(entries.device)


@inner_product(FactoredFisher, MiniBlocks)
def _factored_formed(a: FactoredFisher, b: MiniBlocks) -> float:
    """Return Σ_b ⟨F_b, M_b⟩; where all blocks of a group are one, of the mean F_b."""
    within, total = FactoredMiniBlocks(b.partition, a.samples, a.count), 0.0
    for group, (held, (count, _)) in enumerate(
        zip(b.blocks, b.partition.sizes, strict=True)
    ):
        if len(held) == 1:
            mean = within._mean(group)
            total += count * float((mean * held).sum(dtype=torch.float64))
            continue
        for part, panel in within._panels(group):
            total += float((panel * held[part]).sum(dtype=torch.float64))
    return total


@inner_product(FactoredMiniBlocks, MiniBlocks)
def _blocks_formed(a: FactoredMiniBlocks, b: MiniBlocks) -> float:
    if same_partition(a.partition, b.partition):
        return _factored_formed(FactoredFisher(a.samples, a.count), b)
    return a.formed.inner(b)
