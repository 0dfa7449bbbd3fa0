"""The exact Fisher of all blocks, between layers too."""

from dataclasses import dataclass
from typing import final

from fisherlab.approximators.network.base import NetworkStatistics, provenance
from fisherlab.operators import FactoredFisher
from fisherlab.operators.factored import Form
from fisherlab.operators.network import WholeNetwork
from fisherlab.samples import StackedSamples
from fisherlab.showing import shown
from fisherlab.statistics.network import require_matching


@shown
@final
@dataclass(frozen=True)
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

    takes = "network"

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
        samples = StackedSamples(tuple(layer.samples for layer in layers))
        whole = FactoredFisher(samples, layers[0].count, made, self.form)
        shapes = {name: layer.weight_shape for name, layer in statistics.items()}
        return WholeNetwork(whole, shapes, made)
