r"""How much of a block one Kronecker product can hold: the singular values of Z(F).

Z(F) is Van Loan's rearrangement, in which a Kronecker product has rank one. The best sum
of r products leaves ``(Σ_{k>r} σ_k²)^½`` of the norm.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import UnsupportedMetric
from fisherlab.numerics.linalg import eigh, factorised
from fisherlab.operators import FactoredFisher, KroneckerSum, Operator
from fisherlab.samples import OuterSamples
from fisherlab.settings import numeric

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
    `kronecker_spectrum`; NaN for zero.

    Examples
    --------
    >>> kronecker_tail(KroneckerSum(((torch.eye(2), torch.eye(2)),), (2, 2)))
    0.0
    """
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
