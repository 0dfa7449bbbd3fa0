"""What methods of batch-mean gradients take, whichever statistics they are given."""

from dataclasses import replace

from fisherlab.errors import NeedsMeanGradient
from fisherlab.statistics import LayerStatistics, MeanGradient
from fisherlab.statistics.values import summable


def mean_of(statistics: LayerStatistics | MeanGradient, method: str) -> MeanGradient:
    r"""Return the gradient of the mean loss, :math:`\frac1N \sum_n D_n`.

    Of several Monte-Carlo columns (each weighted 1/√k) it is the mean over the draws.

    Raises
    ------
    NeedsMeanGradient
        If the columns are no gradients of losses: those of `Exact()` are the columns of
        a root, whose sum means nothing, and compressed columns are mixed.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(4, 3), torch.zeros(4, 2))
    >>> stats = fl.collect(torch.nn.Linear(3, 2), data, fl.Gaussian(), fl.Empirical())
    >>> mean_of(stats["weight"], "a method").gradient.shape
    torch.Size([2, 4])
    """
    if isinstance(statistics, MeanGradient):
        return replace(statistics, gradient=summable(statistics.gradient))
    s = statistics
    columns = s.samples.columns
    kind = s.provenance.fisher
    of_losses = kind.startswith(("Empirical", "MonteCarlo")) or (not kind and columns == 1)
    if s.compressed or not of_losses:
        msg = (
            f"{method} of block {s.name!r} takes the gradient of the mean loss, which "
            f"statistics of {kind or 'several columns'} do not give. Use Empirical(), "
            "MonteCarlo(1), or fl.mean_gradient(...)."
        )
        raise NeedsMeanGradient(msg)
    ones = s.samples.squared_norms().new_ones(1, columns, s.samples.examples)
    total = s.samples.combine(ones)[0] / columns**0.5
    return MeanGradient(s.block, total / s.count, s.count, s.provenance)
