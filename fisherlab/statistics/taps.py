"""Inputs and output gradients of layers, through zero taps added to their outputs.

The network becomes a function of the taps alone; pulling a column of the output back
through it gives the gradient at every tapped output, and no weight gradient is formed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.layers import SharedForm
from fisherlab.layers.shared_form import with_bias_column
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import ModelView

Calls = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Tapped:
    """A block whose modules are tapped.

    Parameters
    ----------
    modules
        The modules that use the weight (several if it is tied).
    form
        How their inputs and output gradients become rows of features.
    bias
        Whether the inputs get a column of ones.
    outputs
        Output shapes of the calls of one forward pass, without the example axis.
    clone_inputs
        Whether an input is overwritten later in the forward pass.
    """

    modules: tuple[nn.Module, ...]
    form: SharedForm
    bias: bool
    outputs: tuple[torch.Size, ...]
    clone_inputs: bool = False


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: output, layer inputs, and the pullback of output columns."""

    output: Tensor
    inputs: Calls
    pullback: Callable[[Tensor], tuple[Calls]]


def forward(view: ModelView, tapped: Mapping[str, Tapped], batch: Batch) -> Pass:
    """Run the model once with zero taps and keep what the pullback needs."""
    n = len(batch)
    zeros = {
        name: tuple(
            torch.zeros(n, *shape, dtype=view.dtype, device=view.device)
            for shape in tap.outputs
        )
        for name, tap in tapped.items()
    }

    def run(taps: Calls) -> tuple[Tensor, Calls]:
        seen: dict[str, list[Tensor]] = {name: [] for name in tapped}
        with _hooked(tapped, taps, seen):
            output = view(batch)
        return output, {name: tuple(inputs) for name, inputs in seen.items()}

    done: Any = torch.func.vjp(run, zeros, has_aux=True)
    output, pullback, inputs = done
    return Pass(output, inputs, pullback)


@contextmanager
def _hooked(
    tapped: Mapping[str, Tapped], taps: Calls, seen: dict[str, list[Tensor]]
) -> Iterator[None]:
    handles = []

    def tap(name: str, clone: bool) -> Callable[[Any, Any, Tensor], Tensor]:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            call = len(seen[name])
            seen[name].append(args[0].clone() if clone else args[0])
            return output + taps[name][call]

        return hook

    try:
        for name, block in tapped.items():
            hook = tap(name, block.clone_inputs)
            handles += [module.register_forward_hook(hook) for module in block.modules]
        yield
    finally:
        for handle in handles:
            handle.remove()


def features(tap: Tapped, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return (n, t, d_in): the calls stacked along the positions, the bias column last."""
    rows = [tap.form.inputs(x.detach()) for x in inputs]
    joined = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return with_bias_column(joined) if tap.bias else joined


def pull(
    done: Pass, tapped: Mapping[str, Tapped], columns: Tensor, at_once: int
) -> dict[str, Tensor]:
    """Pull output columns (v, *output.shape) back to gradients (v, n, t, d_out).

    One column after the other (a loop is the fastest on a CPU), or `at_once` of them
    under vmap.
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in tapped}
    with torch.no_grad():  # the pullback builds no graph of its own
        for part in columns.split(at_once):
            if len(part) == 1:
                (single,) = done.pullback(part[0])
                pulled = {name: tuple(g[None] for g in gs) for name, gs in single.items()}
            else:
                (pulled,) = torch.func.vmap(done.pullback)(part)
            for name, tap in tapped.items():
                rows = [tap.form.gradients(g) for g in pulled[name]]
                pieces[name].append(rows[0] if len(rows) == 1 else torch.cat(rows, 2))
    return {name: torch.cat(rows) for name, rows in pieces.items()}
