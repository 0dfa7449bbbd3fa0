"""Kronecker-factored curvature: products of second moments, or of one and the identity."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import OfSums
from fisherlab.approximators.costs import Cost, factor_flops, input_flops, pair_numbers
from fisherlab.approximators.states import Sums, add, by_group
from fisherlab.numerics.packed import (
    mirror_,
    second_moment,
    symmetric_flops,
    symmetric_product_,
)
from fisherlab.operators import KroneckerDiagonal, KroneckerSum, Operator, Provenance
from fisherlab.samples import Samples, TokenSamples
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics

Sharing = Literal["expand", "reduce"]


def factor_sums(
    statistics: LayerStatistics, sharing: Sharing, method: str
) -> tuple[Tensor, Tensor]:
    """Return Σ g gᵀ and Σ a aᵀ over a chunk; further columns add to the first only.

    Raises
    ------
    NeedsSharedForm
        If the block has no inputs and output gradients.
    """
    gradients, inputs = _rows(statistics, sharing, method)
    return second_moment(gradients), second_moment(inputs)


def kfac_sums(
    state: Sums | None, statistics: LayerStatistics, sharing: Sharing, method: str
) -> Sums:
    """Add a chunk to the sums behind the factors, row factor first, in place.

    They are upper triangles until `factors` mirrors them. Of an embedding, whose rows
    belong to the inputs: the diagonal of Σ a aᵀ, which is how often each row was looked
    up, and Σ g gᵀ.

    Raises
    ------
    NeedsSharedForm
        If the block has no inputs and output gradients.
    """
    if statistics.tokens is not None:
        return add(state, Sums.of(statistics, *_embedding_sums(statistics, sharing)))
    factors_ = _rows(statistics, sharing, method)
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
    inputs, gradients = statistics.shared(method)
    inputs = inputs if statistics.count else inputs[:0]
    if sharing == "reduce":
        inputs, gradients = inputs.sum(1, keepdim=True), gradients.sum(2, keepdim=True)
    return gradients.flatten(0, 2), inputs.flatten(0, 1)


def input_sums(state: Sums | None, statistics: LayerStatistics, method: str) -> Sums:
    """Add a chunk to Σ a aᵀ, or to its diagonal of an embedding; else as `kfac_sums`.

    Raises
    ------
    NeedsSharedForm
        If the block has no inputs and output gradients.
    """
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
    if state.looked_up:
        return rows / state.count, cols * scale
    return mirror_(rows) * scale, mirror_(cols) / state.count


def product(
    factors_: tuple[Tensor, Tensor], state: Sums, made: Provenance
) -> KroneckerSum | KroneckerDiagonal:
    """Return G ⊗ A; with a diagonal row factor nothing of d_out² numbers is formed."""
    rows, cols = factors_
    if rows.dim() == 1:
        return KroneckerDiagonal(rows, cols, made)
    return KroneckerSum(((rows, cols),), state.weight_shape, made)


@shown
@by_group
@final
@dataclass(frozen=True)
class KFAC(OfSums[Sums, Operator]):
    r"""Kronecker-factored approximate curvature, F ≈ G ⊗ A.

    .. math:: A = \frac1N \sum_{nt} a_{nt} a_{nt}^T, \quad
              G = \frac{1}{NT} \sum_{vnt} g_{vnt} g_{vnt}^T

    Parameters
    ----------
    sharing
        How positions that share the weight are treated: "expand" as above (for
        convolutions this is KFC), "reduce" with a summed and g averaged over positions.

    Notes
    -----
    A `KroneckerSum`, or a relative: a grouped convolution gets a product for each group
    (`Stacked`); the weight of an embedding is stored the other way round, so its row
    factor is A, which is diagonal under "expand" (`KroneckerDiagonal`): d_out + d_in²
    numbers, no one-hot inputs. Padding counts as no position.

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

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the second moments of a chunk, in place: go on with what is returned.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        return kfac_sums(state, statistics, self.sharing, "KFAC")

    def finish(self, state: Sums) -> KroneckerSum | KroneckerDiagonal:
        """Divide by examples and positions."""
        made = state.provenance.by(repr(self))
        return product(factors(state, self.sharing), state, made)

    def cost(self, samples: Samples) -> Cost:
        """Count both second moments."""
        if self.sharing == "expand":
            return Cost(factor_flops(samples), pair_numbers(samples))
        (o, i), n = samples.weight_shape, samples.examples
        flops = symmetric_flops(o, samples.columns * n) + symmetric_flops(i, n)
        return Cost(flops, pair_numbers(samples))


@shown
@by_group
@final
@dataclass(frozen=True)
class FOOF(OfSums[Sums, Operator]):
    r"""Gradient descent on neurons, :math:`F \approx I \otimes A`.

    .. math:: A = \frac1N \sum_{nt} a_{nt} a_{nt}^T

    Notes
    -----
    The scale of the output gradients is left out, as published: read its matrix cosine
    and its direction, not its Frobenius error. The same for every kind of Fisher; holds
    d_in² numbers. Of an embedding, whose weight is stored the other way round, A ⊗ I
    with the diagonal A of how often each row was looked up. Exact where the output
    gradients are white and independent of the inputs, e.g. the last layer under a unit
    Gaussian likelihood.

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

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the second moment of a chunk's inputs.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        return input_sums(state, statistics, "FOOF")

    def finish(self, state: Sums) -> KroneckerSum | KroneckerDiagonal:
        """Divide by the examples."""
        inputs = state.tensors[0] / state.count
        outputs = state.weight_shape[1 if state.looked_up else 0]
        eye = torch.eye(outputs, dtype=inputs.dtype, device=inputs.device)
        pair = (inputs, eye) if state.looked_up else (eye, inputs)
        return product(pair, state, state.provenance.by(repr(self)))

    def cost(self, samples: Samples) -> Cost:
        """Count the second moment of the inputs."""
        return Cost(input_flops(samples), pair_numbers(samples))


register.add(
    {"kfac": KFAC(), "kfac-reduce": KFAC(sharing="reduce")},
    aliases={"kflr": "kfac", "kfc": "kfac"},  # all columns of Exact(); convolutions
)
register.add({"foof": FOOF()})
