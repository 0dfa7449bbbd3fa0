"""Kronecker products for all pairs of layers, and KFAC with an inverse along the chain."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import NetworkStatistics, OfSums
from fisherlab.approximators.network.block_diagonal import (
    own_method,
    provenance,
)
from fisherlab.operators import Provenance
from fisherlab.operators.network import (
    BlockDiagonal,
    BlockTridiagonal,
    DirectSum,
    KroneckerBlocks,
    NetworkOperator,
)
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.network import require_matching


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Sums Σ g_i g_jᵀ and Σ a_i a_jᵀ over examples and columns, for pairs of layers.

    Parameters
    ----------
    rows, columns
        The sums by pair of names.
    count
        Examples.
    """

    rows: dict[tuple[str, str], Tensor]
    columns: dict[tuple[str, str], Tensor]
    count: int
    provenance: Provenance

    def __add__(self, other: "Moments") -> "Moments":
        """Add up two parts of the data."""
        count = self.count + other.count
        return replace(
            self,
            rows={pair: value + other.rows[pair] for pair, value in self.rows.items()},
            columns={p: value + other.columns[p] for p, value in self.columns.items()},
            count=count,
            provenance=replace(self.provenance, examples=count),
        )

    def factors(self, row: str, column: str) -> tuple[Tensor, Tensor]:
        """Return G_ij = E[g_i g_jᵀ] and A_ij = E[a_i a_jᵀ]."""
        split = max(self.count, 1)
        return self.rows[row, column] / split, self.columns[row, column] / split


def moments(
    statistics: NetworkStatistics, pairs: Sequence[tuple[str, str]], method: str
) -> Moments:
    """Sum over a chunk; further columns of counted examples add to the gradients only.

    Raises
    ------
    NeedsSharedForm
        If a layer has no inputs and output gradients.
    ValueError
        If a layer is used at several positions, or columns do not match.
    """
    made = provenance(statistics, method)
    names = dict.fromkeys(name for pair in pairs for name in pair)
    held = {name: _at_one_position(statistics[name], method) for name in names}
    for row, column in pairs:
        require_matching(method, statistics[row], statistics[column])
    count = statistics[pairs[0][0]].count
    rows, columns = {}, {}
    for row, column in pairs:
        (a, g), (b, h) = held[row], held[column]
        rows[row, column] = g.flatten(0, 1).T @ h.flatten(0, 1)
        columns[row, column] = a.T @ b if count else a.new_zeros(a.shape[1], b.shape[1])
    return Moments(rows, columns, count, made)


def refusal(layer: LayerStatistics) -> str:
    """Say why a layer has no cross moments with others, or return nothing."""
    if layer.tokens is not None:
        return "it is an embedding, described by tokens"
    if layer.uses or layer.turned:
        return "its weight is used in several ways, or stored (in, out)"
    if (groups := len(layer.by_group())) > 1:
        return f"its rows are in {groups} groups with inputs of their own"
    if layer.inputs is None:
        return "it is described by per-example gradient matrices only"
    positions = layer.inputs.shape[1]
    if positions != 1:
        return f"its weight is shared by {positions} positions"
    return ""


def _at_one_position(layer: LayerStatistics, method: str) -> tuple[Tensor, Tensor]:
    inputs, gradients = layer.shared(method)
    reason = refusal(layer)
    if reason:
        msg = (
            f"{method}: layer {layer.name!r} cannot be joined to others, because {reason}; "
            "layers used at one position are expected. Leave it out."
        )
        raise ValueError(msg)
    return inputs[:, 0], gradients[:, :, 0]


@shown
@final
@dataclass(frozen=True)
class KhatriRao(OfSums[Moments, KroneckerBlocks]):
    r"""The Kronecker approximation of all pairs of layers, which KFAC takes blocks of.

    .. math:: \tilde F_{ij} = G_{ij} \otimes A_{ij}, \quad
              G_{ij} = E[g_i g_j^T], \; A_{ij} = E[a_i a_j^T]

    Notes
    -----
    Costs N·(Σ d_in)² + V·N·(Σ d_out)² multiply-adds, holds (Σ d_in)² + (Σ d_out)²
    numbers. Positive semi-definite: a principal submatrix of G ⊗ A over all layers. Exact
    for one example, and for deep linear networks with a Gaussian likelihood. Layers must
    be used at one position and have matching columns (``collect(compress=False)``).

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 3.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(
    ...     model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False
    ... )
    >>> KhatriRao()(stats).stored_numbers
    49
    """

    takes: ClassVar[str] = "network"

    def accumulate(self, state: Moments | None, statistics: NetworkStatistics) -> Moments:
        """Add the moments of a chunk.

        Raises
        ------
        NeedsSharedForm
            If a layer has no inputs and output gradients.
        ValueError
            If a layer is used at several positions, or columns do not match.
        """
        pairs = list(combinations_with_replacement(statistics, 2))
        found = moments(statistics, pairs, "KhatriRao")
        return found if state is None else state + found

    def finish(self, state: Moments) -> KroneckerBlocks:
        """Divide by the examples and put the moments together."""
        names = list(dict.fromkeys(row for row, _ in state.rows))
        own = [state.factors(name, name) for name in names]
        shapes = {n: (len(g), len(a)) for n, (g, a) in zip(names, own, strict=True)}
        split = max(state.count, 1)
        rows, columns = (
            _table(names, sums) / split for sums in (state.rows, state.columns)
        )
        return KroneckerBlocks(rows, columns, shapes, state.provenance)


def _table(names: list[str], sums: dict[tuple[str, str], Tensor]) -> Tensor:
    """Put the blocks of the upper triangle, and their mirror images, together."""
    rows = [
        torch.cat([sums[i, j] if (i, j) in sums else sums[j, i].T for j in names], 1)
        for i in names
    ]
    return torch.cat(rows)


register.add({"khatri-rao": KhatriRao()})


@final
@dataclass(frozen=True, eq=False)
class ChainState:
    """The moments along the chain, and the states of the blocks beside it."""

    chain: Moments
    beside: dict[str, Any]
    methods: dict[str, Any]
    order: tuple[str, ...]
    provenance: Provenance

    def __add__(self, other: "ChainState") -> "ChainState":
        """Add up two parts of the data.

        Raises
        ------
        ValueError
            If the parts join different layers.
        """
        _require_same_chain(self.chain, other.chain)
        beside = {
            name: self.methods[name].merge(old, other.beside[name])
            for name, old in self.beside.items()
        }
        chain = self.chain + other.chain
        made = replace(self.provenance, examples=chain.count)
        return replace(self, chain=chain, beside=beside, provenance=made)


@shown
@final
@dataclass(frozen=True)
class KFACTridiagonal(OfSums[ChainState, NetworkOperator]):
    r"""The block-tridiagonal KFAC: a chain of layers, each regressed on the next.

    .. math:: \hat F^{-1} = Ξ^T Λ Ξ

    with Ξ the identity with :math:`-Ψ_{i,i+1}` on the block super-diagonal and Λ the
    inverses of the conditional moments Σ_i; see `fisherlab.operators.network`.

    Parameters
    ----------
    chain
        Names of the layers that are joined, in the order of the forward pass. By default
        all layers that can be, in the order of the statistics.

    Notes
    -----
    A layer can be joined if it is used at one position (a fully connected layer on
    vectors). Blocks beside the chain get KFAC, or their exact block where KFAC does not
    apply; the operator's repr names them. The columns of the layers must match: collect
    with ``compress=False``.

    F̂ equals the Kronecker approximation of all pairs of layers (`KhatriRao`) on its
    block tridiagonal, its inverse is zero outside of it. The paper damps before the chain
    is formed: ``op.solve(ws, Factored(λ))``. A number means (F̂ + λI)⁻¹ by conjugate
    gradients. Costs, beside KFAC's, V·N·d_out(i)·d_out(i+1) + N·d_in(i)·d_in(i+1) a pair
    of neighbours, and that many numbers without the V·N and N.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 4.3.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    >>> stats = fl.collect(model, (x, None), fl.Gaussian(), compress=False)
    >>> op = KFACTridiagonal()(stats)
    >>> step = op.solve({"0": torch.ones(2, 4), "1": torch.ones(4, 3)}, fl.Factored(0.1))
    >>> step["1"].shape
    torch.Size([4, 3])
    """

    takes: ClassVar[str] = "network"

    chain: Sequence[str] | None = None

    def accumulate(
        self, state: ChainState | None, statistics: NetworkStatistics
    ) -> ChainState:
        """Add a chunk of all blocks.

        Raises
        ------
        NeedsSharedForm
            If a layer named in the chain has no inputs and output gradients.
        ValueError
            If a layer named in the chain is unknown or used at several positions, no
            layer can be joined, or columns do not match.
        """
        made = provenance(statistics, "KFACTridiagonal")
        names = self._joined(statistics)
        others = {name: s for name, s in statistics.items() if name not in names}
        pairs = [(name, name) for name in names] + list(pairwise(names))
        chain = moments(statistics, pairs, "KFACTridiagonal")
        if state is None:
            methods = {name: own_method(s) for name, s in others.items()}
            held: dict[str, Any] = dict.fromkeys(others)
            made = made.by(_label(names, list(others)))
        else:
            _require_same_chain(state.chain, chain)
            methods, held, made = state.methods, state.beside, state.provenance
            chain = state.chain + chain
        beside = {n: methods[n].accumulate(held[n], s) for n, s in others.items()}
        made = replace(made, examples=chain.count)
        return ChainState(chain, beside, methods, tuple(statistics), made)

    def _joined(self, statistics: NetworkStatistics) -> list[str]:
        if self.chain is not None:
            unknown = [name for name in self.chain if name not in statistics]
            twice = len(set(self.chain)) < len(self.chain)
            if unknown or twice or not self.chain:
                msg = (
                    f"KFACTridiagonal(chain={list(self.chain)}): names among "
                    f"{list(statistics)}, each once, are expected; {unknown} are unknown."
                )
                raise ValueError(msg)
            return list(self.chain)
        reasons = {name: refusal(layer) for name, layer in statistics.items()}
        names = [name for name, reason in reasons.items() if not reason]
        if not names:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
            msg = f"KFACTridiagonal: no layer can be joined to others ({why})."
            raise ValueError(msg)
        return names

    def finish(self, state: ChainState) -> NetworkOperator:
        """Join the layers: a `BlockTridiagonal`, beside other blocks in a `DirectSum`."""
        found = state.chain
        own = [row for row, column in found.rows if row == column]
        factors = {name: found.factors(name, name) for name in own}
        links = [found.factors(row, column) for row, column in pairwise(own)]
        joined = BlockTridiagonal(factors, links, state.provenance)
        if not state.beside and tuple(own) == state.order:
            return joined
        blocks = {n: state.methods[n].finish(held) for n, held in state.beside.items()}
        beside = [BlockDiagonal(blocks, state.provenance)] if blocks else []
        return DirectSum([joined, *beside], state.order, state.provenance)


def _label(names: list[str], others: list[str]) -> str:
    joined = "–".join(names)
    alone = f", alone: {', '.join(others)}" if others else ""
    return f"KFACTridiagonal(chain {joined}{alone})"


def _require_same_chain(first: Moments, second: Moments) -> None:
    if first.rows.keys() != second.rows.keys():
        msg = (
            "KFACTridiagonal: two parts of the data join different layers, "
            f"{list(first.rows)} and {list(second.rows)}. Name the `chain`."
        )
        raise ValueError(msg)


register.add({"kfac-tridiagonal": KFACTridiagonal()})
