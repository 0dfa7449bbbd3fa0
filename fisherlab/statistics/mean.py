"""The gradient of the mean loss, which some methods take instead of the statistics."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.layers import blocks as blocks_of
from fisherlab.layers import select
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.memory import chunks
from fisherlab.operators.base import Provenance
from fisherlab.statistics import per_example
from fisherlab.statistics.batches import Batch, batches
from fisherlab.statistics.collect import EXAMPLES
from fisherlab.statistics.model_view import ModelView, view
from fisherlab.statistics.values import MeanGradient


def mean_gradient(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, MeanGradient]:
    """Return the gradient of the mean loss, (1/N) Σ_n ∇ℓ_n, block by block.

    Parameters and errors are those of `collect`; labels are needed.

    Examples
    --------
    >>> from fisherlab.likelihoods import Gaussian
    >>> data = (torch.ones(5, 4), torch.zeros(5, 2))
    >>> mean_gradient(nn.Linear(4, 2), data, Gaussian())["weight"].weight_shape
    (2, 5)
    """
    seen = replace(view(model, dtype), copies_data=True)
    blocks = select(blocks_of(model), layers)
    named = dict(seen.model.named_parameters())
    leaves = {name: named[name] for block in blocks.values() for name in block.parameters}
    totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    count = 0
    for whole in batches(data, seen.device, seen.dtype):
        for part in chunks(len(whole), EXAMPLES):
            loss = _loss(seen, whole.part(part), likelihood)
            for grads in per_example.pull(seen, loss, leaves, torch.ones_like(loss)[None]):
                for name, grad in grads.items():
                    totals[name] += grad
            count += part.stop - part.start
    made = Provenance(likelihood=repr(likelihood), examples=count, method="mean gradient")
    means = {name: total / count for name, total in totals.items()}
    return {
        name: MeanGradient(block, block.pack(means), count, replace(made, layer=name))
        for name, block in blocks.items()
    }


def _loss(seen: ModelView, batch: Batch, likelihood: Likelihood) -> Tensor:
    if batch.y is None:
        msg = "mean_gradient needs the data's labels, but y is None."
        raise ValueError(msg)
    output = seen.directly(per_example.differentiable(batch))
    likelihood.check(output, batch.y)
    with torch.enable_grad():
        return likelihood.loss(output, batch.y).sum()
