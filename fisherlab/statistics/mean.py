"""The gradient of the mean loss, which some methods take instead of the statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherlab.layers import Block, alone, select
from fisherlab.layers import blocks as blocks_of
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.held import Held
from fisherlab.numerics.memory import chunks, readable
from fisherlab.operators.base import Provenance
from fisherlab.settings import numeric
from fisherlab.showing import html_table
from fisherlab.statistics import per_example
from fisherlab.statistics.batches import Batch, Progress, batches, reporter
from fisherlab.statistics.collect import EXAMPLES
from fisherlab.statistics.fishers import (
    Empirical,
    Exact,
    Fisher,
    require_kinds,
)
from fisherlab.statistics.model_view import ModelView, require_repeatable, view


@final
@dataclass(frozen=True, eq=False, repr=False)
class MeanGradient(Held):
    """The gradient of the mean loss over a batch, for one block.

    Parameters
    ----------
    block
        Which parameters.
    gradient
        (1/N) Σ_n ∇ℓ_n, shape (d_out, d_in).
    count
        N.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> found = fl.mean_gradient(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> found["weight"].gradient.shape
    torch.Size([2, 4])
    """

    block: Block
    gradient: Float[Tensor, "o i"]
    count: int
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.block.weight_shape

    def without_examples(self) -> "MeanGradient":
        """Return the same for a weighted sum in which it does not count."""
        return replace(self, count=0)

    def __repr__(self) -> str:
        """Return one line."""
        norm = float(self.gradient.norm())
        made = f"{self.provenance}, " if str(self.provenance) else ""
        return f"MeanGradient({made}{self.weight_shape}, norm {norm:.3g})"

    def _repr_html_(self) -> str:
        """Return a small folding table for notebooks."""
        rows = {
            "layer": self.block.name,
            "likelihood": self.provenance.likelihood,
            "examples N": self.count,
            "weight (d_out, d_in)": self.weight_shape,
            "norm": f"{float(self.gradient.norm()):.6g}",
            "numbers": f"{self.gradient.dtype}, {self.gradient.device}, "
            f"{readable(self.nbytes)}",
        }
        return html_table("MeanGradient", rows)


@numeric
@alone
def mean_gradient(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    *,
    fisher: Fisher | None = None,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    first: int = 0,
    progress: Progress = False,
) -> dict[str, MeanGradient]:
    """Return the gradient of the mean loss, (1/N) Σ_n ∇ℓ_n, block by block.

    Parameters
    ----------
    model, data, likelihood, layers, dtype, first, progress
        As in `collect`.
    fisher
        Whose labels: `Empirical()`, the data's (by default), or `MonteCarlo(k)`, drawn
        from the model. Then ∇ℓ_n is the mean over k draws, and with k = 1 its outer
        product has the expectation F/N: the statistic of MBF-True and TNT.

    Raises
    ------
    ValueError
        If y is None and the data's labels are meant, or for `Exact()`: the mean over the
        model's own distribution of ∇ℓ is zero. Else as `collect`.

    Examples
    --------
    >>> from fisherlab.likelihoods import Gaussian
    >>> data = (torch.ones(5, 4), torch.zeros(5, 2))
    >>> mean_gradient(nn.Linear(4, 2), data, Gaussian())["weight"].weight_shape
    (2, 5)
    """
    require_kinds(likelihood, fisher)
    if isinstance(fisher, Exact):
        msg = (
            "mean_gradient with Exact(): the mean over the model's own labels is zero. "
            "Use Empirical() or MonteCarlo(1)."
        )
        raise ValueError(msg)
    seen = replace(view(model, dtype), copies_data=True)
    blocks = select(blocks_of(model), layers)
    named = dict(seen.model.named_parameters())
    leaves = {name: named[name] for block in blocks.values() for name in block.parameters}
    totals: dict[str, Tensor] = {}
    count, (report, finish) = 0, reporter(progress)
    for whole in batches(data, seen.device, seen.dtype, first, seen.model):
        if not count:
            require_repeatable(seen, whole)
        for part in chunks(len(whole), EXAMPLES):
            output, column = _column(seen, whole.part(part), likelihood, fisher)
            for grads in per_example.pull(seen, output, leaves, column[None]):
                for name in list(grads):  # one by one: each is as large as the model
                    grad = grads.pop(name)
                    totals[name] = totals[name] + grad if name in totals else grad
            count += part.stop - part.start
            report(part.stop - part.start)
    finish()
    made = Provenance.of(fisher or Empirical(), likelihood, count).by("mean gradient")

    def mean(name: str) -> Tensor:
        total = totals.pop(name, None)
        return torch.zeros_like(leaves[name]) if total is None else total / count

    found = {}
    for name, block in blocks.items():
        packed = block.pack({one: mean(one) for one in block.parameters})
        found[name] = MeanGradient(block, packed, count, replace(made, layer=name))
    return found


def _column(
    seen: ModelView, batch: Batch, likelihood: Likelihood, fisher: Fisher | None
) -> tuple[Tensor, Tensor]:
    """Return what is differentiated, and the column that is pulled back from it."""
    of_labels = fisher is None or isinstance(fisher, Empirical)
    if of_labels and batch.y is None:
        msg = "mean_gradient needs the data's labels, but y is None."
        raise ValueError(msg)
    output = seen.directly(per_example.differentiable(batch))
    likelihood.check(output, batch.y)
    if of_labels and batch.y is not None:
        with torch.enable_grad():
            loss = likelihood.loss(output, batch.y).sum()
        return loss, torch.ones_like(loss)
    assert fisher is not None
    held = output.detach()
    every = slice(0, fisher.column_count(likelihood, held))
    columns = fisher.columns(likelihood, held, batch.y, batch.first, every)
    # A column of k draws carries 1/√k, so that outer products add up to a mean.
    return output, columns.sum(0) / len(columns) ** 0.5
