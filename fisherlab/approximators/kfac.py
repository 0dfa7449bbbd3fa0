"""Kronecker-factored curvature: products of second moments, or of one and the identity."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import (
    Cost,
    OfSums,
    Sums,
    add,
    by_group,
    factor_flops,
    input_flops,
    pair_numbers,
)
from fisherlab.numerics.linalg import factorised
from fisherlab.numerics.packed import (
    mirror_,
    second_moment,
    symmetric_flops,
    symmetric_product_,
)
from fisherlab.operators import KroneckerDiagonal, KroneckerSum, Operator, Provenance
from fisherlab.samples import Samples, TokenSamples
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics

Sharing = Literal["expand", "reduce"]


def factor_sums(
    statistics: LayerStatistics, sharing: Sharing, method: str
) -> tuple[Tensor, Tensor]:
    """Return Σ g gᵀ and Σ a aᵀ over a chunk; further columns add to the first only.

    Raises
    ------
    NeedsSharedForm
        If the block has no inputs and output gradients, or is stored (in, out).
    """
    totals: list[Tensor] = []
    for piece in statistics.pieces():
        piece.shared(method)  # outputs in the rows are expected of these two
        found = [second_moment(rows) for rows in _rows(piece, sharing, method)]
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    rows, cols = totals
    return rows, cols


def rows_by_part(
    statistics: LayerStatistics, method: str, *, turned: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield output gradients and inputs as rows, part by part where they are stored.

    Parameters
    ----------
    turned
        Whether the weight may have its outputs in the columns.

    Raises
    ------
    NeedsSharedForm
        If the block has no such pair.
    """
    for piece in statistics.pieces():
        inputs, gradients = piece.pair(method) if turned else piece.shared(method)
        yield gradients.flatten(0, 2), inputs.flatten(0, 1)


def roots(
    statistics: LayerStatistics, method: str, *, turned: bool = False
) -> tuple[Tensor, Tensor]:
    """Return X and Y with XᵀX = Σ g gᵀ and YᵀY = Σ a aᵀ.

    They are the rows; of stored statistics, which memory may not hold, triangles as wide
    as the layer, from a QR decomposition that goes on from part to part.

    Raises
    ------
    NeedsSharedForm
        As `rows_by_part`.
    """
    found: tuple[Tensor, ...] = ()
    for pair in rows_by_part(statistics, method, turned=turned):
        if statistics.stored is None:
            return pair
        found = found or tuple(rows[:0] for rows in pair)
        stacks = [torch.cat(both) for both in zip(found, pair, strict=True)]
        found = tuple(factorised("qr", s, method, mode="r").R for s in stacks)
    rows, cols = found
    return rows, cols


@final
@dataclass(frozen=True, eq=False)
class UseSums:
    """The sums of every use of a weight that is used in several ways."""

    uses: tuple[Any, ...]  # of Sums

    @property
    def provenance(self) -> Provenance:
        """That of the weight."""
        made: Provenance = self.uses[0].provenance
        return made

    @property
    def open(self) -> Mapping[int, Sums]:
        """The sums of every use."""
        return dict(enumerate(self.uses))

    def put(self, states: Mapping[int, Sums]) -> "UseSums":
        """Return others."""
        return UseSums(tuple(states[k] for k in range(len(self.uses))))

    def __add__(self, other: "UseSums") -> "UseSums":
        """Add up two parts of the data."""
        return self.put({k: use + other.uses[k] for k, use in self.open.items()})


AnySums = Sums | UseSums
Summing = Callable[[Sums | None, LayerStatistics], Sums]


def use_by_use(one: Summing, state: AnySums | None, statistics: LayerStatistics) -> AnySums:
    """Add a chunk to the sums of each use, or to those of the only one."""
    if not statistics.uses:
        assert not isinstance(state, UseSums)
        return one(state, statistics)
    before: Sequence[Sums | None] = [None] * len(statistics.uses)
    if isinstance(state, UseSums):
        before = state.uses
    pairs = zip(before, statistics.uses, strict=True)
    return UseSums(tuple(one(old, use) for old, use in pairs))


def kfac_sums(
    state: AnySums | None, statistics: LayerStatistics, sharing: Sharing, method: str
) -> AnySums:
    """Add a chunk to the sums behind the factors, row factor first, in place.

    They are upper triangles until `factors` mirrors them. Where the rows belong to the
    inputs Σ a aᵀ comes first, of an embedding its diagonal: how often each row was looked
    up.

    Raises
    ------
    NeedsSharedForm
        If the block has no inputs and output gradients.
    """
    one = partial(_kfac_sums, sharing=sharing, method=method)
    return use_by_use(one, state, statistics)


def _kfac_sums(
    state: Sums | None, statistics: LayerStatistics, sharing: Sharing, method: str
) -> Sums:
    if statistics.tokens is not None:
        return add(state, Sums.of(statistics, *_embedding_sums(statistics, sharing)))
    factors_ = _rows(statistics, sharing, method)
    if statistics.turned:
        factors_ = factors_[::-1]
    if state is None:
        state = Sums.of(
            statistics, *(x.new_zeros(x.shape[1], x.shape[1]) for x in factors_)
        )
    else:
        state = state.counting(statistics.count, statistics.positions)
    for total, rows in zip(state.tensors, factors_, strict=True):
        if len(rows):
            symmetric_product_(total, rows)
    return state


def _rows(
    statistics: LayerStatistics, sharing: Sharing, method: str
) -> tuple[Tensor, Tensor]:
    """Return the output gradients and the inputs of a chunk as rows.

    Columns of examples that are counted already bring no inputs.
    """
    inputs, gradients = statistics.pair(method)
    inputs = inputs if statistics.count else inputs[:0]
    if sharing == "reduce":
        inputs, gradients = inputs.sum(1, keepdim=True), gradients.sum(2, keepdim=True)
    return gradients.flatten(0, 2), inputs.flatten(0, 1)


def input_sums(state: AnySums | None, statistics: LayerStatistics, method: str) -> AnySums:
    """Add a chunk to Σ a aᵀ, or to its diagonal of an embedding; else as `kfac_sums`.

    Raises
    ------
    NeedsSharedForm
        If the block has no inputs and output gradients.
    """
    return use_by_use(partial(_input_sums, method=method), state, statistics)


def _input_sums(state: Sums | None, statistics: LayerStatistics, method: str) -> Sums:
    if state is not None and not statistics.count:
        return state
    samples = statistics.samples
    if isinstance(samples, TokenSamples):
        return add(state, Sums.of(statistics, samples.counts()))
    _, inputs = _rows(statistics, "expand", method)
    return add(state, Sums.of(statistics, second_moment(inputs)))


def _embedding_sums(statistics: LayerStatistics, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """Return Σ a aᵀ of one-hot a that are never formed, and Σ g gᵀ."""
    samples = statistics.samples
    assert isinstance(samples, TokenSamples)
    gradients = samples.gradients
    if sharing == "expand":
        rows, cols = samples.counts(), second_moment(gradients.flatten(0, 2))
    else:  # Σ_t a counts the rows an example looks up
        cols = second_moment(gradients.sum(2).flatten(0, 1))
        ones = (samples.tokens >= 0).to(samples.dtype)[None, :, :, None]
        table = TokenSamples(samples.tokens, ones, samples.size)
        rows = table.row_side(ones.new_ones(1, 1))
    return (rows, cols) if statistics.count else (torch.zeros_like(rows), cols)


def factors(state: Sums, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """Turn the sums into KFAC's factors; of an embedding the first may be a diagonal."""
    rows, cols = state.tensors
    split = max(state.positions, 1)
    # under reduce the gradients are means over positions
    scale = state.count / split**2 if sharing == "reduce" else 1 / split
    rows, cols = (mirror_(x) if x.dim() == 2 else x for x in (rows, cols))
    if state.turned:
        return rows / state.count, cols * scale
    return rows * scale, cols / state.count


def joint_factors(state: AnySums, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """Return KFAC's factors; of several uses the partial traces of the sum of products."""
    if isinstance(state, Sums):
        return factors(state, sharing)
    pairs = [factors(use, sharing) for use in state.uses]
    whole = [(torch.diag(r) if r.dim() == 1 else r, c) for r, c in pairs]
    rows = torch.stack([r * c.trace() for r, c in whole]).sum(0)
    return rows, torch.stack([c * r.trace() for r, c in whole]).sum(0)


def product(
    factors_: tuple[Tensor, Tensor], state: Sums, made: Provenance
) -> KroneckerSum | KroneckerDiagonal:
    """Return G ⊗ A; with a diagonal row factor nothing of d_out² numbers is formed."""
    rows, cols = factors_
    if rows.dim() == 1:
        return KroneckerDiagonal(rows, cols, made)
    return KroneckerSum(((rows, cols),), state.weight_shape, made)


def summed(
    products: Sequence[KroneckerSum | KroneckerDiagonal], made: Provenance
) -> KroneckerSum:
    """Return Σ G ⊗ A over the uses of a weight."""
    terms = tuple(term for one in products for term in one.terms)
    return KroneckerSum(terms, products[0].weight_shape, made)


@by_group
@final
@setting
class KFAC(OfSums[AnySums, Operator]):
    r"""Kronecker-factored approximate curvature, F ≈ G ⊗ A.

    .. math:: A = \frac1N \sum_{nt} a_{nt} a_{nt}^T, \quad
              G = \frac{1}{NT} \sum_{vnt} g_{vnt} g_{vnt}^T

    Parameters
    ----------
    sharing
        How positions that share the weight are treated: "expand" as above (for
        convolutions this is KFC), "reduce" with a summed and g averaged over positions.

    Raises
    ------
    ValueError
        For a `sharing` that is neither "expand" nor "reduce".

    Notes
    -----
    A `KroneckerSum`, or a relative: a grouped convolution gets a product for each group
    (`Stacked`), as do projections that use some rows of one weight each; a weight stored
    (in, out) has A for its row factor, ``A ⊗ G``. So has an embedding, whose A is diagonal
    under "expand" (`KroneckerDiagonal`): d_out + d_in² numbers, no one-hot inputs. Padding
    counts as no position. Calls that use a weight alike are positions of one product, over
    all of which A is summed and G averaged; ways of use that differ (an embedding whose
    table is the last layer's weight too, a weight and its transpose) add a product each,
    as the moments between positions are left out.

    Costs V·N·T·d_out² + N·T·d_in² multiply-adds (half of it through symmetry), holds
    d_out² + d_in² numbers. Exact for one example at one position, and for deep linear
    networks with a Gaussian likelihood. With all columns (`Exact()`) this is also KFLR.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671; Grosse & Martens 2016 (convolutions);
    Eschenhagen et al. 2023 (expand, reduce).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.KFAC()(stats["weight"]).trace()
    8.0
    """

    by_column: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True

    sharing: Sharing = "expand"

    def __post_init__(self) -> None:
        """Check the way of sharing."""
        if self.sharing not in ("expand", "reduce"):
            msg = f"KFAC(sharing={self.sharing!r}): 'expand' or 'reduce' is expected."
            raise ValueError(msg)

    def accumulate(self, state: AnySums | None, statistics: LayerStatistics) -> AnySums:
        """Add the second moments of a chunk, in place: go on with what is returned.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        return kfac_sums(state, statistics, self.sharing, "KFAC")

    def finish(self, state: AnySums) -> KroneckerSum | KroneckerDiagonal:
        """Divide by examples and positions."""
        if isinstance(state, UseSums):
            made = state.provenance.by(repr(self))
            return summed([self.finish(use) for use in state.uses], made)
        made = state.provenance.by(repr(self))
        return product(factors(state, self.sharing), state, made)

    def cost(self, samples: Samples) -> Cost:
        """Count both second moments."""
        if self.sharing == "expand":
            return Cost(factor_flops(samples), pair_numbers(samples))
        (o, i), n = samples.weight_shape, samples.examples
        flops = symmetric_flops(o, samples.columns * n) + symmetric_flops(i, n)
        return Cost(flops, pair_numbers(samples))


@by_group
@final
@setting
class FOOF(OfSums[AnySums, Operator]):
    r"""Gradient descent on neurons, F ≈ I ⊗ A.

    .. math:: A = \frac1N \sum_{nt} a_{nt} a_{nt}^T

    Notes
    -----
    The scale of the output gradients is left out, as published: read its matrix cosine
    and its direction, not its Frobenius error. The same for every kind of Fisher; holds
    d_in² numbers. Of a weight stored (in, out) A ⊗ I, of an embedding with the diagonal A
    of how often each row was looked up; a sum of them over different uses. Exact where the
    output gradients are white and independent of the inputs, e.g. the last layer under a
    unit Gaussian likelihood.

    References
    ----------
    Benzing 2022, arXiv 2201.12250.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.FOOF()(stats["weight"]).trace()
    8.0
    """

    by_column: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True

    def accumulate(self, state: AnySums | None, statistics: LayerStatistics) -> AnySums:
        """Add the second moment of a chunk's inputs.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        return input_sums(state, statistics, "FOOF")

    def finish(self, state: AnySums) -> KroneckerSum | KroneckerDiagonal:
        """Divide by the examples."""
        if isinstance(state, UseSums):
            made = state.provenance.by(repr(self))
            return summed([self.finish(use) for use in state.uses], made)
        inputs = state.tensors[0] / state.count
        outputs = state.weight_shape[1 if state.turned else 0]
        eye = torch.eye(outputs, dtype=inputs.dtype, device=inputs.device)
        pair = (inputs, eye) if state.turned else (eye, inputs)
        return product(pair, state, state.provenance.by(repr(self)))

    def cost(self, samples: Samples) -> Cost:
        """Count the second moment of the inputs."""
        return Cost(input_flops(samples), pair_numbers(samples))


register.add(
    {"kfac": KFAC(), "kfac-reduce": KFAC(sharing="reduce")},
    aliases={"kflr": "kfac", "kfc": "kfac"},  # all columns of Exact(); convolutions
)
register.add({"foof": FOOF()})
