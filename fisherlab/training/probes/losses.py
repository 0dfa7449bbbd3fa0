"""How well the network does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import xarray as xr
from torch import nn

from fisherlab.likelihoods import Likelihood
from fisherlab.problems.problem import Pair
from fisherlab.training.loop import performance
from fisherlab.training.probes.moment import Moment, Source

SETS: Final[tuple[Source, ...]] = ("train", "test")


@final
@dataclass(frozen=True)
class Losses:
    """Mean losses in nats, and accuracies of a classifier, on both sets.

    Gives `train_loss`, `test_loss` and, for `Categorical`, `train_accuracy` and
    `test_accuracy`.

    Parameters
    ----------
    examples
        At most so many random examples of each set; all by default.

    Examples
    --------
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> fl.follow(problem, steps=1, probes=[fl.probes.Losses(100)]).train_loss.sizes
    Frozen({'step': 2})
    """

    examples: int | None = None

    def __call__(self, moment: Moment) -> xr.Dataset:
        """Evaluate the network."""
        sets = {str(name): moment.data(name, self.examples) for name in SETS}
        return xr.Dataset(measured(moment.model, moment.problem.likelihood, sets))


def measured(
    model: nn.Module, likelihood: Likelihood, sets: Mapping[str, Pair]
) -> dict[str, xr.DataArray]:
    """Return losses and accuracies on the sets by their names; on an empty one, none."""
    found = {}
    for name, data in sets.items():
        if not len(data[0]):
            continue  # one's own data may come without a test set
        done = performance(model, likelihood, data)
        made = {"long_name": f"mean {name} loss", "units": "nat"}
        found[f"{name}_loss"] = xr.DataArray(done.loss, attrs=made)
        if done.accuracy is not None:
            made = {"long_name": f"{name} accuracy", "units": "1"}
            found[f"{name}_accuracy"] = xr.DataArray(done.accuracy, attrs=made)
    return found
