"""A model seen from outside: called with given parameters, left as it was found."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherlab.errors import UnsupportedModelError
from fisherlab.layers import require_independent_examples
from fisherlab.statistics.batches import Batch


@dataclass(frozen=True, eq=False)
class ModelView:
    """A model with detached copies of its state in the wanted precision."""

    model: nn.Module
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype

    def __call__(
        self, batch: Batch, replaced: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the output, with some parameters replaced.

        Raises
        ------
        UnsupportedModelError
            If the model does not return one tensor with the example in axis 0.
        """
        args, kwargs = batch.arguments()
        state = {**self.parameters, **self.buffers, **(replaced or {})}
        with _current_rnn_weights(self.model), sdpa_kernel(SDPBackend.MATH):
            output: Any = torch.func.functional_call(self.model, state, args, kwargs)
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"The model returns {type(output).__name__}; one tensor is expected. "
                "Wrap it in a module that returns the logits alone."
            )
        return output


def view(model: nn.Module, dtype: torch.dtype | None) -> ModelView:
    """Check a model and take detached copies of its state.

    Raises
    ------
    UnsupportedModelError
        For train-mode batch norm, active dropout, or a model without parameters.
    ValueError
        If a parameter holds NaN or infinity.
    """
    require_independent_examples(model)
    named = dict(model.named_parameters())
    if not named:
        raise UnsupportedModelError("The model has no parameters.")
    for name, parameter in named.items():
        if not bool(torch.isfinite(parameter).all()):
            msg = f"The parameter {name!r} holds NaN or infinity."
            raise ValueError(msg)
    floats = [p for p in named.values() if p.is_floating_point()]
    chosen = dtype or floats[0].dtype

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(chosen if tensor.is_floating_point() else tensor.dtype)

    parameters = {name: cast(parameter) for name, parameter in named.items()}
    buffers = {name: cast(b).clone() for name, b in model.named_buffers()}
    return ModelView(model, parameters, buffers, floats[0].device, chosen)


@contextmanager
def _current_rnn_weights(model: nn.Module) -> Iterator[None]:
    """Let recurrent modules read swapped parameters: they keep a flat list of their own."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                kept = module._flat_weights
                stack.callback(setattr, module, "_flat_weights", kept)
                handle = module.register_forward_pre_hook(_refresh_flat_weights)
                stack.callback(handle.remove)
        yield


def _refresh_flat_weights(module: Any, args: Any) -> None:
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
