"""Moving averages of operators: one home for what averaging means."""

from dataclasses import replace
from functools import singledispatch

from fisherlab.operators import (
    Dense,
    Diagonal,
    FactoredFisher,
    FactoredMiniBlocks,
    KroneckerEigen,
    KroneckerSum,
    MiniBlocks,
    Operator,
)
from fisherlab.operators.kronecker_congruence import Term


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
        block). `KroneckerEigen` takes the new basis and the diagonal of the averaged
        matrix in it. Exact blocks become dense; all others are plain averages.

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
    msg = f"average: {old!r} has no average of its own form."
    raise ValueError(msg)


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
    terms = [_pair(a, b, weight) for a, b in zip(old.terms, fresh, strict=False)]
    terms += fresh[len(old.terms) :]  # a pair that was not there before
    faded = [(weight * g, weight * a) for g, a in old.terms[len(fresh) :]]
    return replace(new, terms=(*terms, *faded), precision=new.dtype, place=new.device)


def _pair(old: Term, new: Term, weight: float) -> Term:
    """Average one pair after giving the new factors the signs of the old ones."""
    agreement = sum(float((a * b).sum()) for a, b in zip(old, new, strict=True))
    sign = 1.0 if agreement >= 0 else -1.0
    rows, cols = (
        weight * a + (1 - weight) * sign * b for a, b in zip(old, new, strict=True)
    )
    return rows, cols


@_average.register
def _(old: KroneckerEigen, new: KroneckerEigen, weight: float) -> KroneckerEigen:
    rows = (new.row_basis.T @ old.row_basis).square()
    cols = (new.column_basis.T @ old.column_basis).square()
    kept = rows @ old.entries @ cols.T  # the diagonal of the old matrix in the new basis
    return replace(new, entries=weight * kept + (1 - weight) * new.entries)


@_average.register
def _(old: Diagonal, new: Diagonal, weight: float) -> Diagonal:
    return Diagonal(weight * old.entries + (1 - weight) * new.entries, new.provenance)


@_average.register(Dense)
@_average.register(FactoredFisher)
def _(old: Dense | FactoredFisher, new: Dense | FactoredFisher, weight: float) -> Dense:
    matrix = weight * old.to_dense() + (1 - weight) * new.to_dense()
    return Dense(matrix, new.weight_shape, new.provenance)


@_average.register(MiniBlocks)
@_average.register(FactoredMiniBlocks)
def _(
    old: MiniBlocks | FactoredMiniBlocks,
    new: MiniBlocks | FactoredMiniBlocks,
    weight: float,
) -> MiniBlocks:
    before, after = _formed(old), _formed(new)
    pairs = zip(before.blocks, after.blocks, strict=True)
    blocks = tuple(weight * a + (1 - weight) * b for a, b in pairs)
    return MiniBlocks(after.partition, blocks, after.provenance)


def _formed(op: MiniBlocks | FactoredMiniBlocks) -> MiniBlocks:
    return op if isinstance(op, MiniBlocks) else op.formed
