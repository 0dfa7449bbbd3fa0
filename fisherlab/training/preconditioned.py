"""What both optimisers with a curvature have: units, their state, and parts of a batch."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fisherlab.layers import uncompiled
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics import devices
from fisherlab.statistics import Fisher
from fisherlab.statistics.batches import Batch
from fisherlab.training import serialise
from fisherlab.training.curvature import Curvature
from fisherlab.training.moves import Parameters, check_group, match_
from fisherlab.training.passes import Passes, Takes
from fisherlab.training.units import Owners, Unit, packed, unpacked


class Preconditioned(torch.optim.Optimizer):
    """An optimiser over the blocks of a model, whose units hold matrices and inverses."""

    key: ClassVar[str]  # of its part of a state dict
    kept: ClassVar[tuple[str, ...]]  # what stands there beside the units

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        curvature: Curvature,
        fisher: Fisher,
        takes: Takes,
        params: Iterable[Any] | None,
        settings: dict[str, Any],
        group: Any = None,
    ) -> None:
        self.curvature, self.fisher = curvature, fisher
        self.model, self.likelihood = uncompiled(model), likelihood
        compress, left = not curvature.couples, curvature.passed_by
        self._passes = Passes(model, likelihood, fisher, takes, compress, left, group)
        self.steps = 0
        self.units: dict[str, Unit] = {}
        self.exceptions: dict[str, str] = {}
        self._owners: Owners = {}
        self._unseen: list[devices.Look] = []
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        super().__init__(trainable if params is None else params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters with its own settings.

        Raises
        ------
        ValueError
            For settings out of range, foreign parameters or half precision.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.model, type(self).__name__)
        except ValueError:
            self.param_groups.pop()
            raise

    def _ready(self) -> None:
        """Refuse autocast; bring the state to the parameters' precision and device."""
        device = next(p.device for g in self.param_groups for p in g["params"])
        if torch.is_autocast_enabled(device.type):
            name = type(self).__name__
            msg = f"{name}: factorisations need full precision; leave autocast."
            raise ValueError(msg)
        match_(self.state)

    def look(self) -> None:
        """Look at the steps since the last renewal, and raise what was wrong with one.

        On an accelerator a step that renews nothing does not wait: what is not finite
        there, or has wrong labels, moves no parameter, and the next renewal,
        `state_dict` or this tells of it.
        """
        unseen, self._unseen = self._unseen, []
        devices.look(unseen)

    def _parameters(self) -> Parameters:
        """Return what is optimised now."""
        return Parameters.of(self, self.model, type(self).__name__)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle with the model and all state; torch's own leaves them out."""
        self.look()
        return serialise.lasting(self)

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain containers of tensors, safe for ``weights_only``."""
        self.look()
        found = super().state_dict()
        found["param_groups"] = serialise.pack(found["param_groups"])
        own = serialise.pack({name: getattr(self, name) for name in self.kept})
        named = dict(self.model.named_parameters())
        found[self.key] = own | packed(self.units, self._owners, named)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state: bit for bit, or in the precision of the parameters.

        Raises
        ------
        ValueError
            If the state is not of this kind of optimiser, or of other parameters.
        """
        if self.key not in state_dict:
            msg = "load_state_dict: the state of another kind of optimiser was given."
            raise ValueError(msg)
        groups = serialise.unpack(state_dict["param_groups"])
        own = state_dict[self.key]
        units, known = unpacked(own, self._parameters())
        super().load_state_dict({**state_dict, "param_groups": groups})
        self.units, self._owners, self._unseen = units, known, []
        for name in self.kept:
            setattr(self, name, serialise.unpack(own[name]))


def first_part(batch: Batch, fraction: float) -> Batch:
    """Return the first examples of a batch, a share of it and at least one."""
    if fraction == 1:
        return batch
    return batch.part(slice(0, max(1, round(fraction * len(batch)))))
