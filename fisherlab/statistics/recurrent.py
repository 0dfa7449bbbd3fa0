"""Recurrent modules, made to work under vmap and left as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def followed(module: nn.RNNBase) -> Iterator[None]:
    """Let a recurrent module begin with states that take part in ``vmap``.

    Adding to its own zero states in place fails there. The flat list of parameters that
    it fills anew when they are swapped is put back.
    """
    kept = module._flat_weights
    handle = module.register_forward_pre_hook(_with_states, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        module._flat_weights = kept


def _with_states(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, hx = (*args, None, None)[:2]
    x, hx = kwargs.get("input", x), kwargs.get("hx", hx)
    if hx is None and isinstance(x, Tensor):
        return (x, _zero_states(module, x)), {}
    return args, kwargs


def _zero_states(module: nn.RNNBase, x: Tensor) -> Any:
    """Return what the module would begin with, made from its input."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batch = [] if x.dim() == 2 else [x.shape[0 if module.batch_first else 1]]
    hidden = x.new_zeros(layers, *batch, module.proj_size or module.hidden_size)
    if not isinstance(module, nn.LSTM):
        return hidden
    return hidden, x.new_zeros(layers, *batch, module.hidden_size)
