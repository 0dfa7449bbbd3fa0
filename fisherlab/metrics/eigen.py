"""The eigendecomposition of any operator, made once and used for many dampings."""

import torch

from fisherlab.errors import UnsupportedMetric
from fisherlab.operators import Eigenform, Operator
from fisherlab.operators.eigenform import of_matrix

DENSE_ROWS = 4000  # blocks without a structured basis are diagonalised up to this size


def decomposed(operator: Operator, metric: str = "eigenvalues") -> Eigenform:
    """Return the eigendecomposition of an operator, in float64.

    Parameters
    ----------
    operator
        Samples, Kronecker products, eigenforms, mini-blocks and diagonals keep their
        structure; anything else is diagonalised densely up to p = 4000.
    metric
        Who asks, for the error.

    Raises
    ------
    UnsupportedMetric
        If the operator has no structured basis and p is above 4000.
    NumericalError
        If it holds NaN or infinity.

    Notes
    -----
    d_out³ + d_in³ for Kronecker forms, M³ for M samples, p³ for the rest.

    Examples
    --------
    >>> from fisherlab.operators import Dense
    >>> dense = Dense(torch.diag(torch.tensor([3.0, 1.0])), (1, 2))
    >>> decomposed(dense).eigenvalues().tolist()
    [3.0, 1.0]
    """
    double = operator.to(torch.float64)
    found = double.eigenform()
    if found is not None:
        return found
    if double.shape[0] > DENSE_ROWS:
        raise UnsupportedMetric(
            metric,
            repr(operator),
            f"It has no structured eigenbasis and p = {double.shape[0]} is above "
            f"{DENSE_ROWS}. Use metrics of products (frobenius_error, spectral_error, "
            "direction_cosine), or a smaller layer.",
        )
    return of_matrix(double.to_dense(), double.weight_shape, repr(operator))
