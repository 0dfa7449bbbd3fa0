r"""Where a block and a network's Fisher have their mass: mini-blocks, layers, couplings.

How much of a block one Kronecker product can hold, the singular values of Z(F) tell: Van
Loan's rearrangement, in which a Kronecker product has rank one. The best sum of r products
leaves ``(Σ_{k>r} σ_k²)^½`` of the norm.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import UnsupportedMetric
from fisherlab.metrics.pairs import require_operator
from fisherlab.numerics.devices import chunks
from fisherlab.numerics.linalg import eigh, factorised
from fisherlab.operators import (
    FactoredFisher,
    FactoredMiniBlocks,
    KroneckerSum,
    Operator,
    Partition,
)
from fisherlab.operators.base import unit_weights
from fisherlab.samples import OuterSamples, Samples, TokenSamples
from fisherlab.samples.cross import gram_block
from fisherlab.settings import numeric
from fisherlab.statistics import Layers, LayerStatistics, Statistics

Measure = Literal["mean_absolute", "squared_mass"]
PANEL_NUMBERS = 2**21  # entries of one Gram panel, one a layer at a time


def squared_mass(operator: Operator, partition: Partition) -> float:
    """Return the share of Σ M_ij² inside of the mini-blocks of a partition.

    ``√(1 − squared_mass)`` is the error of keeping the mini-blocks alone.

    Parameters
    ----------
    operator
        A block.
    partition
        Which entries of its weight form which mini-block.

    Returns
    -------
    float
        Between 0 and 1; NaN for the zero matrix.

    Raises
    ------
    ValueError
        If the partition is of another shape.

    Notes
    -----
    Through Gram matrices for a factored exact block, else p products in panels.

    Examples
    --------
    >>> from fisherlab.operators import Dense
    >>> rows = Partition.by_row((2, 1))
    >>> squared_mass(Dense(torch.ones(2, 2), (2, 1)), rows)
    0.5
    """
    double = _fitting("squared_mass", operator, partition)
    whole = double.frobenius_norm() ** 2
    if not whole > 0:
        return float("nan")
    if isinstance(double, FactoredFisher):
        inside = FactoredMiniBlocks(partition, double.samples, double.count)
        return inside.frobenius_norm() ** 2 / whole
    return _panel_mass(double, partition, 2)


def absolute_mass(operator: Operator, partition: Partition) -> float:
    """Return the share of Σ |M_ij| inside of the mini-blocks of a partition.

    Parameters, errors and value are those of `squared_mass`; every entry is looked at, by
    p products in panels, without p² memory.

    Examples
    --------
    >>> from fisherlab.operators import Dense
    >>> rows = Partition.by_row((2, 1))
    >>> absolute_mass(Dense(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), (2, 1)), rows)
    0.75
    """
    return _panel_mass(_fitting("absolute_mass", operator, partition), partition, 1)


def entry_share(partition: Partition) -> float:
    """Return the share of the p² entries that lie inside of the mini-blocks.

    Examples
    --------
    >>> entry_share(Partition.by_row((4, 2)))
    0.25
    """
    o, i = partition.weight_shape
    return sum(g.numel() * g.shape[1] for g in partition.groups) / (o * i) ** 2


def _fitting(metric: str, operator: Operator, partition: Partition) -> Operator:
    if partition.weight_shape != operator.weight_shape:
        raise ValueError(
            f"{metric}: the partition is of shape {partition.weight_shape}, but "
            f"{operator!r} acts on weights of shape {operator.weight_shape}."
        )
    return operator.to(torch.float64)


def _panel_mass(operator: Operator, partition: Partition, power: int) -> float:
    """Return the share of Σ |M_ij|^power inside, column panel by column panel."""
    label = torch.empty(operator.shape[0], dtype=torch.long, device=operator.device)
    first = 0
    for group in partition.groups:
        numbers = torch.arange(len(group), device=operator.device) + first
        label[group.to(operator.device)] = numbers[:, None]
        first += len(group)
    inside = whole = 0.0
    start = 0
    for unit in unit_weights(operator):
        sizes = (operator @ unit).flatten(1).abs().pow(power)
        mine = label[start : start + len(unit), None] == label[None, :]
        inside += float(sizes[mine].sum())
        whole += float(sizes.sum())
        start += len(unit)
    return inside / whole if whole > 0 else float("nan")


def layer_table(
    matrix: Float[Tensor, "p p"],
    offsets: Mapping[str, slice],
    measure: Measure = "mean_absolute",
) -> Float[Tensor, "k k"]:
    """Return one number per pair of layers of a network matrix or its inverse.

    Parameters
    ----------
    matrix
        The whole matrix, e.g. ``fl.full_matrix(stats).values``.
    offsets
        Block name to the rows it takes, in order.
    measure
        "mean_absolute", the mean of |M_ij| over the entries of the pair; "squared_mass",
        its share of Σ M_ij².

    Raises
    ------
    ValueError
        If the measure is unknown.

    Examples
    --------
    >>> halves = {"a": slice(0, 1), "b": slice(1, 2)}
    >>> layer_table(torch.tensor([[3.0, -1.0], [-1.0, 2.0]]), halves).tolist()
    [[3.0, 1.0], [1.0, 2.0]]
    """
    if measure not in ("mean_absolute", "squared_mass"):
        msg = f"layer_table(measure={measure!r}): 'mean_absolute' or 'squared_mass'."
        raise ValueError(msg)
    power = 1 if measure == "mean_absolute" else 2
    out = torch.empty(len(offsets), len(offsets), dtype=torch.float64, device="cpu")
    for row, at in enumerate(offsets.values()):
        for column, to in enumerate(offsets.values()):
            sizes = matrix[at, to].double().abs().pow(power)
            out[row, column] = sizes.mean() if power == 1 else sizes.sum()
    return out if power == 1 else out / out.sum()


@numeric
def band_mass(table: Float[Tensor, "k k"], width: int) -> float:
    """Return the share of a layer × layer table within `width` of its diagonal.

    With the table of ``‖F_ij‖²`` and width 0 the squared mass of the block diagonal, with
    width 1 that of the block tridiagonal.

    Examples
    --------
    >>> band_mass(torch.ones(3, 3), 0), band_mass(torch.ones(2, 2), 1)
    (0.3333333333333333, 1.0)
    """
    whole = float(table.sum())
    place = torch.arange(len(table), device="cpu")
    near = (place[:, None] - place[None, :]).abs() <= width
    return float(table[near.to(table.device)].sum()) / whole if whole > 0 else float("nan")


def cross_squares(stats: Statistics) -> Float[Tensor, "k k"]:
    r"""Return ‖F_ij‖² for every pair of layers, no block formed.

    .. math:: ‖F_{ij}‖^2 = \frac{1}{N^2} \sum_{ab}
              ⟨D^i_a, D^i_b⟩ ⟨D^j_a, D^j_b⟩

    Parameters
    ----------
    stats
        Statistics of matching columns: of one column, or collected with
        ``compress=False``.

    Raises
    ------
    ValueError
        If the columns of the layers do not match.

    Notes
    -----
    One M × M Gram matrix a layer, in panels of rows, multiplied pair by pair.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False)
    >>> cross_squares(stats).shape
    torch.Size([2, 2])
    """
    layers = list(stats.values())
    _require_matching(layers)
    samples = [layer.samples.to(torch.float64) for layer in layers]
    total = torch.zeros(len(layers), len(layers), dtype=torch.float64, device="cpu")
    for part in chunks(samples[0].examples, min(map(_panel_examples, samples))):
        panels = torch.stack([_gram_rows(s, part).flatten() for s in samples])
        total += (panels @ panels.T).cpu()
    return total / layers[0].count ** 2


def coupling(stats: Layers) -> Float[Tensor, "k k"]:
    """Return ‖F_ij‖ / √(‖F_ii‖ ‖F_jj‖): 1 on the diagonal, between 0 and 1 elsewhere.

    The root of the cosine of the Gram matrices of two layers. Parameters, errors and cost
    are those of `cross_squares`; NaN for zero blocks.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False)
    >>> table = coupling(stats)
    >>> bool(((table > 0) & (table < 1 + 1e-12)).all())
    True
    """
    stats = Statistics.of(stats, "coupling")
    return normalised(cross_squares(stats))


def normalised(squares: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """Turn ‖F_ij‖² into ‖F_ij‖ / √(‖F_ii‖ ‖F_jj‖).

    Examples
    --------
    >>> normalised(torch.tensor([[4.0, 1.0], [1.0, 4.0]])).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    sizes = squares.diagonal().sqrt()
    return (squares / torch.outer(sizes, sizes)).sqrt()


def _panel_examples(samples: Samples) -> int:
    """Return how many examples a panel takes: few enough to form their matrices."""
    examples = PANEL_NUMBERS // max(1, samples.columns**2 * samples.examples)
    if not isinstance(samples, OuterSamples):
        formed = next(samples.parts(), slice(0, 1))
        examples = min(examples, formed.stop - formed.start)
    return max(1, examples)


def _gram_rows(samples: Samples, part: slice) -> Float[Tensor, "r m"]:
    """Return the rows ⟨D_a, D_b⟩ of some examples a of the Gram matrix, v-major."""
    if isinstance(samples, OuterSamples):
        return gram_block(samples, part, slice(0, samples.examples))
    if isinstance(samples, TokenSamples):
        return samples.project(samples.matrices(part).flatten(0, 1)).flatten(1)
    here = samples.flat(part)
    table = here.new_empty(len(here), samples.columns, samples.examples)
    for other in samples.parts():
        block = here @ samples.flat(other).T
        table[:, :, other] = block.unflatten(1, (samples.columns, -1))
    return table.flatten(1)


def _require_matching(layers: Sequence[LayerStatistics]) -> None:
    compressed = [layer.name for layer in layers if layer.compressed]
    if compressed:
        raise ValueError(
            f"cross_squares: the columns of {', '.join(map(repr, compressed))} were "
            "compressed and no longer match those of other layers. Collect with "
            "compress=False."
        )
    sizes = {(layer.samples.columns, layer.samples.examples) for layer in layers}
    if len(sizes) > 1:
        msg = f"cross_squares: the layers have (columns, examples) {sorted(sizes)}."
        raise ValueError(msg)


DENSE_NUMBERS = 1500**2  # entries of a rearrangement that is decomposed as it stands
GRAM_EXAMPLES = 4000  # examples whose tables are decomposed


def kronecker_spectrum(operator: Operator) -> Float[Tensor, " k"]:
    r"""Return the singular values of the rearranged matrix, descending, in float64.

    .. math:: F = \sum_k σ_k\, U_k \otimes V_k

    with Frobenius-orthonormal U_k and V_k, and ``Σ σ_k² = ‖F‖²``.

    Parameters
    ----------
    operator
        A factored exact block, a sum of Kronecker products, or any small block.

    Returns
    -------
    Tensor
        As many values as can differ from zero.

    Raises
    ------
    UnsupportedMetric
        If the block is too large to be rearranged and its samples share no structure.

    Notes
    -----
    Samples at one position: σ² are the eigenvalues of ``K_G K_A`` with
    ``K_A[n,m] = (a_n·a_m)²`` and ``K_G[n,m] = ⟨G_n, G_m⟩``, N³ in all; values below 1e-7
    of the largest are rounding. Small rearrangements are decomposed directly.

    Examples
    --------
    >>> op = KroneckerSum(((2 * torch.eye(2), torch.eye(2)),), (2, 2))
    >>> [round(value, 9) for value in kronecker_spectrum(op).tolist()]
    [4.0]
    """
    require_operator("kronecker_spectrum", operator)
    double = operator.to(torch.float64)
    if isinstance(double, KroneckerSum):
        return _of_terms(double)
    if isinstance(double, FactoredFisher) and isinstance(double.samples, OuterSamples):
        return _of_outer(double.samples, double.count)
    return _of_dense(double)


def kronecker_ratio(operator: Operator) -> float:
    """Return σ₂ / σ₁ of the Kronecker spectrum: 0 for one product, 1 for a tie.

    Parameters, errors and cost are those of `kronecker_spectrum`; NaN for zero.

    Examples
    --------
    >>> kronecker_ratio(KroneckerSum(((torch.eye(2), torch.eye(2)),), (2, 2)))
    0.0
    """
    values = kronecker_spectrum(operator)
    if not len(values) or not float(values[0]) > 0:
        return float("nan")
    return float(values[1] / values[0]) if len(values) > 1 else 0.0


@numeric
def kronecker_tail(operator: Operator, rank: int = 1) -> float:
    """Return (Σ_{k>rank} σ_k²)^½ / ‖F‖, the least error of a sum of `rank` products.

    `frobenius_error` of ``KPSVD(rank)`` reaches it; no other sum of as many Kronecker
    products (KFAC, TKFAC, …) is below. Parameters, errors and cost are those of
    `kronecker_spectrum`; NaN for zero, a ValueError for a negative rank.

    Examples
    --------
    >>> kronecker_tail(KroneckerSum(((torch.eye(2), torch.eye(2)),), (2, 2)))
    0.0
    """
    if rank < 0:
        raise ValueError(f"kronecker_tail(rank={rank}): at least 0 is expected.")
    return tails(kronecker_spectrum(operator), [rank])[0]


def tails(values: Float[Tensor, " k"], ranks: list[int]) -> list[float]:
    """Return (Σ_{k>r} v_k²)^½ / ‖v‖ for several r, summed from the smallest value.

    Examples
    --------
    >>> tails(torch.tensor([4.0, 3.0]), [0, 1, 2])
    [1.0, 0.6, 0.0]
    """
    squares = values.double().square()
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    if not float(left[0]) > 0:
        return [float("nan")] * len(ranks)
    return [float((left[min(r, len(values))] / left[0]).sqrt()) for r in ranks]


def _of_terms(operator: KroneckerSum) -> Tensor:
    """Orthogonalise the factors of the sum: at most as many values as terms."""
    if not operator.terms:
        return torch.zeros(0, dtype=torch.float64, device=operator.device)
    rows = torch.stack([rows.flatten() for rows, _ in operator.terms])
    cols = torch.stack([cols.flatten() for _, cols in operator.terms])
    left, right = (factorised("qr", side.T, operator, mode="r").R for side in (rows, cols))
    return _values(left @ right.T, operator)


def _values(matrix: Tensor, what: object) -> Tensor:
    found: Tensor = factorised("svdvals", matrix, what)
    return found


def _of_outer(samples: OuterSamples, count: int) -> Tensor:
    if samples.packed_is_cheaper:  # isometric coordinates: the same singular values
        return _values(samples.packed, "the packed rearrangement") / count
    if samples.examples > GRAM_EXAMPLES:
        raise UnsupportedMetric(
            "kronecker_spectrum",
            f"A block of {samples.examples} examples, d_out × d_in = "
            f"{samples.weight_shape}",
            "Take its leading values from KPSVD(rank=r)(stats[name]).singular_values, or "
            f"at most {GRAM_EXAMPLES} examples.",
        )
    inputs, outputs = samples.kept_grams
    values, vectors = eigh(outputs, "the table of output gradients")
    root = vectors * values.clamp_min(0).sqrt()
    squares = eigh(root.T @ inputs @ root, "the table of inputs")[0].clamp_min(0)
    return squares.sqrt().flip(0) / count


def _of_dense(operator: Operator) -> Tensor:
    o, i = operator.weight_shape
    if (o * i) ** 2 > DENSE_NUMBERS:
        raise UnsupportedMetric(
            "kronecker_spectrum",
            repr(operator),
            f"Its rearrangement of {o * o} × {i * i} would have to be formed. Take the "
            "leading values from KPSVD(rank=r)(stats[name]).singular_values.",
        )
    folded = operator.to_dense().view(o, i, o, i).transpose(1, 2)
    return _values(folded.reshape(o * o, i * i), operator)
