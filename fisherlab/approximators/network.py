"""Approximations of the Fisher of a whole network: all statistics in, one operator out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement, pairwise
from typing import Any, ClassVar, final, get_args

import torch
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import (
    Approximator,
    NetworkStatistics,
    OfSums,
    called,
    facts,
)
from fisherlab.approximators.exact import ExactBlock
from fisherlab.approximators.kfac import KFAC
from fisherlab.operators import FactoredFisher, Operator, Provenance
from fisherlab.operators.factored import Form
from fisherlab.operators.network import (
    BlockDiagonal,
    BlockTridiagonal,
    DirectSum,
    KroneckerBlocks,
    NetworkOperator,
    TwoLevel,
    WholeNetwork,
)
from fisherlab.operators.network.two_level import ONE_VECTOR, Coarse, Combination
from fisherlab.samples.parted import stacked
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics, MeanGradient
from fisherlab.statistics.network import require_matching

Choice = str | Approximator | Mapping[str, str | Approximator]


def block_diagonal(approximator: Choice, stats: NetworkStatistics) -> BlockDiagonal:
    """Approximate every block of a network on its own.

    Parameters
    ----------
    approximator
        A name, a value, or a mapping of block names to either, which must name every
        block.
    stats
        Statistics of the blocks.

    Returns
    -------
    BlockDiagonal
        The blocks' operators in the order of the statistics.

    Raises
    ------
    ValueError
        For unknown names, or blocks that are missing or unknown in a mapping.
    NeedsSharedForm
        If a method needs inputs and output gradients that a block does not have; give
        that block another method by a mapping.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(model, (torch.ones(5, 3), None), fl.Gaussian())
    >>> block_diagonal("kfac", stats).weight_shapes
    {'0': (2, 4), '1': (4, 3)}
    """
    stats = _layers(stats)
    chosen = _per_block(approximator, stats)
    made = provenance(stats, f"block-diagonal {_label(approximator)}")
    blocks = {name: called(chosen[name], stats[name], None) for name in stats}
    return BlockDiagonal(blocks, made)


@final
@setting
class PerBlock:
    r"""`block_diagonal` with its approximator chosen: a network approximator.

    .. math:: \hat F = \mathrm{diag}(\hat F_1, \ldots, \hat F_L)

    Parameters
    ----------
    approximator
        A name, a value, or a mapping of block names to either.

    Examples
    --------
    >>> PerBlock("diagonal")
    PerBlock(approximator='diagonal')
    """

    takes: ClassVar[str] = "network"

    approximator: Choice = "kfac"

    def __call__(self, statistics: NetworkStatistics) -> BlockDiagonal:
        """Return the blocks' operators side by side; errors as `block_diagonal`."""
        return block_diagonal(self.approximator, statistics)


def _layers(stats: object) -> NetworkStatistics:
    """Return statistics by block, of one layer too."""
    named = {stats.name: stats} if isinstance(stats, LayerStatistics) else stats
    held = named.values() if isinstance(named, Mapping) else [None]
    if isinstance(named, Mapping) and all(hasattr(one, "provenance") for one in held):
        return named
    raise TypeError(
        "block_diagonal: statistics are expected, as collect returns them, or a mapping "
        f"from names to layers of them; {type(stats).__name__} was given."
    )


def _per_block(choice: Choice, stats: NetworkStatistics) -> dict[str, Approximator]:
    if not isinstance(choice, Mapping):
        return dict.fromkeys(stats, register.named(choice, "block"))
    missing = [name for name in stats if name not in choice]
    unknown = [name for name in choice if name not in stats]
    if missing or unknown:
        raise ValueError(
            f"block_diagonal: the mapping names {list(choice)}; of the blocks "
            f"{list(stats)} it misses {missing}, and {unknown} are unknown."
        )
    return {name: register.named(choice[name], "block") for name in stats}


def _label(choice: Choice) -> str:
    if isinstance(choice, Mapping):
        return ", ".join(sorted({_label(one) for one in choice.values()}))
    return choice if isinstance(choice, str) else repr(choice)


def own_method(statistics: LayerStatistics) -> KFAC | ExactBlock:
    """Return what a block is approximated by on its own: KFAC, or exactly if it cannot.

    Norm layers, bare parameters and tied weights have no inputs and output gradients.
    """
    return KFAC() if statistics.is_shared else ExactBlock()


def provenance(statistics: NetworkStatistics, method: str) -> Provenance:
    """Return how the statistics of all blocks were made, without a layer.

    Raises
    ------
    ValueError
        If there are no blocks.
    """
    made = next((layer.provenance for layer in statistics.values()), None)
    if made is None:
        msg = f"{method}: statistics of at least one block are expected, none given."
        raise ValueError(msg)
    return Provenance(
        fisher=made.fisher,
        likelihood=made.likelihood,
        examples=made.examples,
        seed=made.seed,
        method=method,
    )


register.add({"kfac-block-diagonal": PerBlock("kfac")})


@final
@setting
class MethodByBlock:
    """One method for most blocks, others for those that are named.

    As the mini-block optimiser uses it: one shared block for the large fully connected
    layers, Adam's direction for norm layers, mini-blocks for the rest.

    Parameters
    ----------
    default
        The method of all blocks that are not named.
    choices
        Methods by block name or by a prefix of it that ends at a dot; the longest wins.

    Raises
    ------
    ValueError
        If the methods do not take the same kind of statistics.

    Notes
    -----
    Averages are taken block by block, so every block keeps its method's own. Costs
    nothing beside the methods.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    >>> stats = fl.collect(model, (torch.ones(4, 3), None), fl.Gaussian())
    >>> method = fl.MethodByBlock(fl.KFAC(), {"1": fl.MiniBlock()})
    >>> [type(method(layer)).__name__ for layer in stats.values()]
    ['KroneckerSum', 'FactoredMiniBlocks']
    """

    default: Approximator
    choices: Mapping[str, Approximator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that all methods take the same statistics."""
        kinds = {facts(m).takes for m in (self.default, *self.choices.values())}
        if len(kinds) != 1:
            named = " and ".join(sorted(kinds))
            msg = f"MethodByBlock: the methods take {named}, not the same statistics."
            raise ValueError(msg)

    @property
    def takes(self) -> str:
        """Which statistics an optimiser gives it."""
        return facts(self.default).takes

    def __call__(
        self,
        statistics: LayerStatistics | MeanGradient,
        previous: Operator | None = None,
    ) -> Operator:
        """Return what the block's own method makes of the statistics."""
        method: Any = self.method(statistics.block.name)
        made: Operator = called(method, statistics, previous)
        return made

    def method(self, block: str) -> Approximator:
        """Return the method of a block."""
        named = [n for n in self.choices if block == n or block.startswith(f"{n}.")]
        return self.choices[max(named, key=len)] if named else self.default


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
        raise ValueError(
            f"{method}: layer {layer.name!r} cannot be joined to others, because {reason}; "
            "layers used at one position are expected. Leave it out."
        )
    return inputs[:, 0], gradients[:, :, 0]


@final
@setting
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


@final
@setting
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
            made = made.by(_chain_label(names, list(others)))
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
                raise ValueError(
                    f"KFACTridiagonal(chain={list(self.chain)}): names among "
                    f"{list(statistics)}, each once, are expected; {unknown} are unknown."
                )
            return list(self.chain)
        reasons = {name: refusal(layer) for name, layer in statistics.items()}
        names = [name for name, reason in reasons.items() if not reason]
        if not names:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
            raise ValueError(f"KFACTridiagonal: no layer can be joined to others ({why}).")
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


def _chain_label(names: list[str], others: list[str]) -> str:
    joined = "–".join(names)
    alone = f", alone: {', '.join(others)}" if others else ""
    return f"KFACTridiagonal(chain {joined}{alone})"


def _require_same_chain(first: Moments, second: Moments) -> None:
    if first.rows.keys() != second.rows.keys():
        raise ValueError(
            "KFACTridiagonal: two parts of the data join different layers, "
            f"{list(first.rows)} and {list(second.rows)}. Name the `chain`."
        )


register.add({"kfac-tridiagonal": KFACTridiagonal()})


@final
@setting
class ExactNetwork:
    r"""The exact Fisher over all weights, F = (1/N) Σ d dᵀ with d all of D_vn, in a row.

    Products are sums over the layers; damped solves, spectra and norms go through the
    summed Gram matrix of the M = V·N samples or through the p × p matrix, whichever
    counts fewer flops. Nothing of size p² is held unless asked for.

    Parameters
    ----------
    form
        Where norms, solves and spectra are computed: "dense" (p × p), "gram" (M × M) or
        "auto", by counted flops.

    Notes
    -----
    Needs matching columns: collect with ``compress=False`` where a layer has fewer
    outputs than there are columns. Exact always.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(
    ...     model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False
    ... )
    >>> ExactNetwork()(stats).shape
    (20, 20)
    """

    takes: ClassVar[str] = "network"

    form: Form = "auto"

    def __call__(self, statistics: NetworkStatistics) -> WholeNetwork:
        """Return the exact matrix of all blocks.

        Raises
        ------
        ValueError
            If there are no blocks, or the columns of two layers do not match.
        """
        made = provenance(statistics, "exact network")
        layers = list(statistics.values())
        for layer in layers[1:]:
            require_matching("ExactNetwork", layers[0], layer)
        samples = stacked([layer.samples for layer in layers])
        whole = FactoredFisher(samples, layers[0].count, made, self.form)
        shapes = {name: layer.weight_shape for name, layer in statistics.items()}
        return WholeNetwork(whole, shapes, made)


@final
@setting
class TwoLevelKFAC:
    r"""KFAC with a coarse correction that lets layers act on each other.

    .. math:: K^{-1} + R^T (R (F + λI) R^T)^{-1} R

    with K the damped KFAC blocks, F the exact Fisher of the statistics and R a few
    directions a layer.

    Parameters
    ----------
    coarse
        "nicolaides": the constant of every layer. "residual": K⁻¹ r of every layer, with
        r = v − (F + λI) K⁻¹ v what KFAC leaves of the right-hand side v. "spectral": the
        eigenvectors of the smallest eigenvalues of every layer's block. "krylov": K⁻¹ r,
        K⁻² r, … of every layer.
    combination
        "additive" as above; "multiplicative" applies the coarse solve to what KFAC
        leaves, v − (F + λI) K⁻¹ v, which never increases the error in the norm of
        F + λI; the additive form can.
    vectors
        Directions a layer, for "spectral" and "krylov".

    Raises
    ------
    ValueError
        For an unknown coarse space or combination, which names the known.

    Notes
    -----
    The coarse matrix comes from the samples, λ R Rᵀ included; a common implementation
    uses Kronecker factors of all pairs and adds λ instead of λ‖r‖². Layers without inputs
    and output gradients get their exact block in place of KFAC. Products and norms are
    those of KFAC; the coarse level enters damped solves. Columns must match: collect with
    ``compress=False``. A solve costs one of KFAC, one product with F and one with as many
    directions as there are layers.

    References
    ----------
    Tselepidis et al. 2020, arXiv 2011.00573 (nicolaides, additive, Kronecker coarse
    matrix); Koroko et al. 2023, arXiv 2303.18083 (coarse spaces, residual correction).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(
    ...     model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False
    ... )
    >>> op = TwoLevelKFAC(coarse="residual")(stats)
    >>> op.solve({"0": torch.ones(2, 4), "1": torch.ones(4, 3)}, 0.1)["1"].shape
    torch.Size([4, 3])
    """

    takes: ClassVar[str] = "network"

    coarse: Coarse = "nicolaides"
    combination: Combination = "multiplicative"
    vectors: int = 1

    def __post_init__(self) -> None:
        """Check the choices."""
        if self.coarse not in get_args(Coarse):
            raise ValueError(f"{self!r}: coarse is one of {', '.join(get_args(Coarse))}.")
        if self.combination not in get_args(Combination):
            msg = f"{self!r}: combination is one of {', '.join(get_args(Combination))}."
            raise ValueError(msg)
        if self.vectors < 1 or (self.vectors > 1 and self.coarse in ONE_VECTOR):
            raise ValueError(
                f"{self!r}: at least one direction a layer is expected, and exactly one "
                f"for {' and '.join(ONE_VECTOR)}."
            )

    def __call__(self, statistics: NetworkStatistics) -> TwoLevel:
        """Return the two levels.

        Raises
        ------
        ValueError
            If there are no blocks, or the columns of two layers do not match.
        """
        made = provenance(statistics, repr(self))
        methods = {name: own_method(layer) for name, layer in statistics.items()}
        return TwoLevel(
            block_diagonal(methods, statistics),
            ExactNetwork()(statistics),
            self.coarse,
            self.combination,
            self.vectors,
            made,
        )


register.add({"exact-network": ExactNetwork()})
register.add(
    {
        "two-level-kfac": TwoLevelKFAC(),
        "two-level-kfac-additive": TwoLevelKFAC(combination="additive"),
        "two-level-kfac-krylov": TwoLevelKFAC(coarse="krylov", vectors=2),
        "two-level-kfac-residual": TwoLevelKFAC(coarse="residual"),
        "two-level-kfac-spectral": TwoLevelKFAC(coarse="spectral"),
    }
)
