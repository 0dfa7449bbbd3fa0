"""The exact block, as a method among the others."""

from dataclasses import dataclass
from typing import ClassVar, final

from fisherlab.approximators.held import Held
from fisherlab.operators import FactoredFisher, Operator
from fisherlab.operators.factored import Form
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@shown
@final
@dataclass(frozen=True)
class ExactBlock:
    r"""The exact block F = (1/N) Σ vec(D) vec(D)ᵀ, never formed unless asked.

    Parameters
    ----------
    form
        Where norms, solves and spectra are computed: "dense" (p × p), "gram" (samples
        × samples), or "auto", by counted flops. "matrices" and "pairs" force how the
        dense block of a shared weight is built.

    Notes
    -----
    Holds N·T·(d_in + V·d_out) numbers. Exact always.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.ExactBlock()(stats["weight"]).trace()
    8.0
    """

    holds_samples: ClassVar[bool] = True

    form: Form = "auto"

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> FactoredFisher:
        """Return the exact block of one layer."""
        s = statistics
        made = s.provenance.by("exact")
        return FactoredFisher(s.samples, s.count, made, self.form)

    def accumulate(self, state: Held | None, statistics: LayerStatistics) -> Held:
        """Keep the chunk."""
        return (state or Held()).add(statistics)

    def merge(self, first: Held, second: Held) -> Held:
        """Keep both parts."""
        return first + second

    def next_pass(self, state: Held) -> None:
        """One pass is enough."""

    def finish(self, state: Held) -> FactoredFisher:
        """Return the exact block of all that was kept."""
        return self(state.joined())
