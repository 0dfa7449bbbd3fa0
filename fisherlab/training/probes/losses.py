"""How well the network does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import xarray as xr

from fisherlab.likelihoods import Categorical
from fisherlab.training.loop import accuracy, mean_loss
from fisherlab.training.probes.moment import Moment


@final
@dataclass(frozen=True)
class Losses:
    """Mean losses in nats, and accuracies of a classifier, on both sets.

    Gives `train_loss`, `test_loss` and, for `Categorical`, `train_accuracy` and
    `test_accuracy`.

    Parameters
    ----------
    examples
        At most so many first examples of each set; all by default.

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
        found = {}
        problem = moment.problem
        for name in ("train", "test"):
            data = moment.data("train" if name == "train" else "test", self.examples)
            loss = mean_loss(moment.model, problem.likelihood, data)
            made = {"long_name": f"mean {name} loss", "units": "nat"}
            found[f"{name}_loss"] = xr.DataArray(loss, attrs=made)
            if isinstance(problem.likelihood, Categorical):
                made = {"long_name": f"{name} accuracy", "units": "1"}
                hits = accuracy(moment.model, data, problem.likelihood.class_axis)
                found[f"{name}_accuracy"] = xr.DataArray(hits, attrs=made)
        return xr.Dataset(found)
