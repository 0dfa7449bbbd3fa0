"""Moving averages of operators: one home for what averaging means."""

from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor
from torch.nn import functional as F

from fisherlab.operators import (
    Dense,
    Diagonal,
    FactoredFisher,
    FactoredMiniBlocks,
    KroneckerDiagonal,
    KroneckerEigen,
    KroneckerSum,
    LowRank,
    MiniBlocks,
    Operator,
    RowwiseEigen,
    Stacked,
)
from fisherlab.operators.factored import KEPT_BLOCK
from fisherlab.operators.gradient_roots import FromState
from fisherlab.operators.kronecker_congruence import Term
from fisherlab.operators.mini_blocks import same_partition
from fisherlab.operators.network import (
    BlockDiagonal,
    BlockTridiagonal,
    DirectSum,
    KroneckerBlocks,
    NetworkOperator,
    TwoLevel,
    WholeNetwork,
)
from fisherlab.operators.network.base import same_blocks
from fisherlab.operators.network.block_tridiagonal import Link
from fisherlab.samples import MatrixSamples, OuterSamples, Samples, SharedSamples
from fisherlab.settings import numeric


@numeric
def average(old: Operator, new: Operator, weight: float) -> Operator:
    r"""Average two operators of the same method, weight·old + (1 − weight)·new.

    Parameters
    ----------
    old, new
        Operators over the same weight, of the same kind.
    weight
        ρ, the share of the old one, 0 ≤ ρ ≤ 1.

    Returns
    -------
    Operator
        Kronecker sums are averaged factor by factor, later pairs after aligning their
        signs with the old ones (the published rule; not the Kronecker sum of the averaged
        block); a pair of skew factors does not average with a symmetric one, and takes
        its place. `KroneckerEigen` takes the new basis and the diagonal of the averaged
        matrix in it. Exact blocks become dense, or stay samples while these are fewer
        than the entries of a weight too large to be held dense. Low rank is cut to its
        rank again. Matrices that are functions of a state (Shampoo, Adam, quasi-diagonal)
        average the state. All others are plain averages.

    Raises
    ------
    ValueError
        For a weight outside [0, 1], operators of different shapes or kinds, or a kind
        that has no average of its own form.

    References
    ----------
    Koroko et al. 2022, arXiv 2201.10285, section 3 (factor-wise averages).

    Examples
    --------
    >>> import torch
    >>> one, three = Diagonal(torch.ones(2, 2)), Diagonal(3 * torch.ones(2, 2))
    >>> average(one, three, weight=0.5).trace()
    8.0
    """
    if not 0 <= weight <= 1:
        msg = f"average: weight={weight} is given, a share between 0 and 1 is expected."
        raise ValueError(msg)
    if type(old) is not type(new) and not _both_exact(old, new):
        raise ValueError(_mixed(old, new))
    if old.weight_shape != new.weight_shape:
        raise ValueError(_mixed(old, new))
    return _average(old, new, weight)


@singledispatch
def _average(old: Operator, new: Operator, weight: float) -> Operator:
    raise ValueError(
        f"average: {old!r} has no average of its own form. Take the newest: of an "
        "optimiser average=0, by which a method's own running averages (K-BFGS) are kept."
    )


def _both_exact(old: Operator, new: Operator) -> bool:
    return all(isinstance(op, (Dense, FactoredFisher)) for op in (old, new)) or all(
        isinstance(op, (MiniBlocks, FactoredMiniBlocks)) for op in (old, new)
    )


def _mixed(old: Operator, new: Operator) -> str:
    return (
        f"average: {old!r} and {new!r} were given; two operators of one method over the "
        "same weight are expected."
    )


@_average.register
def _(old: KroneckerSum, new: KroneckerSum, weight: float) -> KroneckerSum:
    fresh = list(new.terms)
    both = zip(old.terms, fresh, strict=False)
    terms = [_pair(a, b, weight, first=k == 0) for k, (a, b) in enumerate(both)]
    terms += fresh[len(old.terms) :]  # a pair that was not there before
    faded = [(weight * g, weight * a) for g, a in old.terms[len(fresh) :]]
    return replace(new, terms=(*terms, *faded), precision=new.dtype, place=new.device)


def _pair(old: Term, new: Term, weight: float, first: bool) -> Term:
    """Average one pair after giving the new factors the signs of the old ones."""
    share: float | Tensor = weight
    if first:  # definite: its trace tells its sign
        opposed = old[0].trace().sign() * new[0].trace().sign() < 0
    else:  # may be skew
        (g, a), (h, b) = (tuple(m.double() for m in pair) for pair in (old, new))
        most = torch.stack([m.abs().amax() for m in (g, a, h, b)]).amax()
        g, a, h, b = (m / most.clamp_min(torch.finfo(m.dtype).tiny) for m in (g, a, h, b))
        opposed = (g * h).sum() + (a * b).sum() < 0
        skew = [(m * m.T).sum() < 0 for m in (g, h)]
        kept = torch.full_like(most, weight)
        share = torch.where(skew[0] == skew[1], kept, 0.0).to(new[0].dtype)
    sign = torch.where(opposed, -1.0, 1.0).to(new[0].dtype)
    return (sign * new[0]).lerp_(old[0], share), (sign * new[1]).lerp_(old[1], share)


@_average.register
def _(old: KroneckerEigen, new: KroneckerEigen, weight: float) -> KroneckerEigen:
    rows = (new.row_basis.T @ old.row_basis).square()
    cols = (new.column_basis.T @ old.column_basis).square()
    kept = rows @ old.entries @ cols.T  # the diagonal of the old matrix in the new basis
    return replace(new, entries=weight * kept + (1 - weight) * new.entries)


@_average.register
def _(old: RowwiseEigen, new: RowwiseEigen, weight: float) -> RowwiseEigen:
    turn = (new.column_basis.T @ old.column_basis).square()
    kept = old.entries @ turn.T
    return replace(new, entries=weight * kept + (1 - weight) * new.entries)


@_average.register
def _(old: KroneckerDiagonal, new: KroneckerDiagonal, weight: float) -> KroneckerDiagonal:
    rows = weight * old.row_diagonal + (1 - weight) * new.row_diagonal
    cols = weight * old.column_factor + (1 - weight) * new.column_factor
    return replace(new, row_diagonal=rows, column_factor=cols)


@_average.register
def _(old: Stacked, new: Stacked, weight: float) -> Stacked:
    pairs = zip(old.parts, new.parts, strict=True)
    parts = tuple(average(a, b, weight) for a, b in pairs)
    return replace(new, parts=parts)


@_average.register
def _(old: Diagonal, new: Diagonal, weight: float) -> Diagonal:
    return Diagonal(weight * old.entries + (1 - weight) * new.entries, new.provenance)


@_average.register
def _(old: FromState, new: FromState, weight: float) -> FromState:
    return old.averaged(new, weight)


@_average.register
def _(old: LowRank, new: LowRank, weight: float) -> LowRank:
    rows = torch.cat([weight**0.5 * old.rows(), (1 - weight) ** 0.5 * new.rows()])
    kept = max(op.rank or len(op.values) for op in (old, new))
    return LowRank.of_rows(rows, kept, new.provenance)


@_average.register(Dense)
@_average.register(FactoredFisher)
def _(
    old: Dense | FactoredFisher, new: Dense | FactoredFisher, weight: float
) -> Dense | FactoredFisher:
    if isinstance(old, FactoredFisher) and isinstance(new, FactoredFisher):
        wide = joined(old, new, weight)
        if wide is not None:
            return wide
    matrix = weight * old.to_dense() + (1 - weight) * new.to_dense()
    return Dense(matrix, new.weight_shape, new.provenance)


@_average.register(MiniBlocks)
@_average.register(FactoredMiniBlocks)
def _(
    old: MiniBlocks | FactoredMiniBlocks,
    new: MiniBlocks | FactoredMiniBlocks,
    weight: float,
) -> MiniBlocks:
    before = _formed(old)
    if isinstance(new, FactoredMiniBlocks):
        return new.averaged_into(before, weight)
    if not same_partition(before.partition, new.partition):
        raise ValueError(f"average: {old!r} and {new!r} have different partitions.")
    pairs = zip(before.blocks, new.blocks, strict=True)
    blocks = tuple(torch.lerp(b, a, weight) for a, b in pairs)
    return MiniBlocks(new.partition, blocks, new.provenance)


def _formed(op: MiniBlocks | FactoredMiniBlocks) -> MiniBlocks:
    return op if isinstance(op, MiniBlocks) else op.formed


def joined(
    old: FactoredFisher, new: FactoredFisher, weight: float
) -> FactoredFisher | None:
    r"""Return weight·old + (1 − weight)·new as one set of samples, where it is wide.

    Damped solves then go through the Gram matrix of all samples (Woodbury), and nothing
    of size p × p is formed. Samples whose share of the trace is below the rounding of the
    sum are left out, so that old batches fade.

    Returns
    -------
    FactoredFisher or None
        None where the dense block is small, or smaller than the Gram matrix.

    Examples
    --------
    >>> one = FactoredFisher(OuterSamples(torch.ones(1, 50), torch.ones(1, 1, 40)), 1)
    >>> joined(one, one, 0.5).samples.examples
    2
    """
    p = old.shape[0]
    samples = old.samples, new.samples
    if p <= KEPT_BLOCK or sum(s.total for s in samples) >= p:
        return None
    count = old.count + new.count
    scales = weight * count / old.count, (1 - weight) * count / new.count
    side = [_faded(s, scale) for s, scale in zip(samples, scales, strict=True)]
    return FactoredFisher(_together(*side), count, new.provenance, new.form)


def _faded(samples: Samples, scale: float) -> Samples:
    """Scale the sum of the samples; leave out what is lost in its rounding."""
    norms = samples.squared_norms().sum(0) * scale
    kept = norms > torch.finfo(samples.dtype).eps / max(len(norms), 1) * norms.sum()
    root = scale**0.5
    if isinstance(samples, (OuterSamples, SharedSamples)):
        gradients = samples.gradients[:, kept] * root
        return type(samples)(samples.inputs[kept], gradients)
    return MatrixSamples(samples.matrices()[:, kept] * root)


def _together(a: Samples, b: Samples) -> Samples:
    """Put the examples of both behind each other."""
    columns = max(a.columns, b.columns)
    if isinstance(a, OuterSamples) and isinstance(b, OuterSamples):
        inputs = torch.cat([a.inputs, b.inputs])
        return OuterSamples(inputs, _cat(a.gradients, b.gradients, columns))
    if isinstance(a, SharedSamples) and isinstance(b, SharedSamples):
        length = max(a.inputs.shape[1], b.inputs.shape[1])
        inputs = torch.cat([_grown(s.inputs, 1, length) for s in (a, b)])
        left, right = (_grown(s.gradients, 2, length) for s in (a, b))
        return SharedSamples(inputs, _cat(left, right, columns))
    return MatrixSamples(_cat(a.matrices(), b.matrices(), columns))


def _cat(a: Tensor, b: Tensor, columns: int) -> Tensor:
    return torch.cat([_grown(t, 0, columns) for t in (a, b)], 1)


def _grown(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Pad one axis with zeros at its end."""
    missing = size - tensor.shape[axis]
    return F.pad(tensor, [0, 0] * (tensor.dim() - axis - 1) + [0, missing])


@_average.register
def _(old: BlockDiagonal, new: BlockDiagonal, weight: float) -> BlockDiagonal:
    _require_same_blocks(old, new)
    blocks = {
        name: average(old.blocks[name], op, weight) for name, op in new.blocks.items()
    }
    return replace(new, blocks=blocks)


@_average.register
def _(old: BlockTridiagonal, new: BlockTridiagonal, weight: float) -> BlockTridiagonal:
    """Average the factors and the links alike, so that the joint moments stay positive."""
    _require_same_blocks(old, new)
    factors = {name: _mix(old.factors[name], b, weight) for name, b in new.factors.items()}
    pairs = zip(old.links, new.links, strict=True)
    return replace(new, factors=factors, links=[_mix(a, b, weight) for a, b in pairs])


@_average.register
def _(old: KroneckerBlocks, new: KroneckerBlocks, weight: float) -> KroneckerBlocks:
    _require_same_blocks(old, new)
    rows, columns = _mix((old.rows, old.columns), (new.rows, new.columns), weight)
    return replace(new, rows=rows, columns=columns)


@_average.register
def _(old: DirectSum, new: DirectSum, weight: float) -> DirectSum:
    _require_same_blocks(old, new)
    parts: list[NetworkOperator] = []
    for before, after in zip(old.parts, new.parts, strict=True):
        mixed = average(before, after, weight)
        assert isinstance(mixed, NetworkOperator)
        parts.append(mixed)
    return replace(new, parts=parts)


@_average.register
def _(old: WholeNetwork, new: WholeNetwork, weight: float) -> WholeNetwork:
    _require_same_blocks(old, new)
    return replace(new, whole=average(old.whole, new.whole, weight))


@_average.register
def _(old: TwoLevel, new: TwoLevel, weight: float) -> TwoLevel:
    """Average the fine level; the coarse one takes the newest statistics."""
    local = average(old.local, new.local, weight)
    assert isinstance(local, BlockDiagonal)
    return replace(new, local=local)


def _mix(old: Link, new: Link, weight: float) -> Link:
    (a, b), (c, d) = old, new
    return weight * a + (1 - weight) * c, weight * b + (1 - weight) * d


def _require_same_blocks(old: NetworkOperator, new: NetworkOperator) -> None:
    if not same_blocks(old, new):
        raise ValueError(
            f"average: {old!r} covers {list(old.weight_shapes)}, {new!r} covers "
            f"{list(new.weight_shapes)}; the same blocks in the same order are expected."
        )
