"""Ctrl-C anywhere in entering or leaving a change of settings leaves them as they were."""

import contextlib
import signal
import sys
import warnings
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torch import nn

import fisherlab
from fisherlab.layers import frozen
from fisherlab.numerics.devices import generators_kept, one_order
from fisherlab.plots.style import publication
from fisherlab.statistics.model_view import (
    buffers_kept,
    gradients_kept,
    plain_attributes_kept,
    swapped,
    view,
)
from fisherlab.training.following import held_interrupt


class Everything(nn.Module):
    """A model with all that is changed for a while: buffers, modes, plain tensors."""

    def __init__(self):
        super().__init__()
        self.cell, self.norm = nn.LSTM(2, 2, bias=False), nn.BatchNorm1d(2)
        self.scale = torch.ones(2)
        self.cell.eval()
        for number, parameter in enumerate(self.parameters()):
            parameter.grad = torch.full_like(parameter, number)


def settings(model):
    """Return every setting that fisherlab changes for a while."""
    cuda, backends = torch.backends.cuda, torch.backends
    modules = list(model.modules())
    return {
        "mkldnn": backends.mkldnn.enabled,
        "fast path": backends.mha.get_fastpath_enabled(),
        "attention": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
        "checkpoints": torch.utils.checkpoint.CheckpointFunction,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": backends.cudnn.benchmark,
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "generator": torch.get_rng_state().numpy().tobytes(),
        "warnings": list(warnings.filters),
        "signals": signal.getsignal(signal.SIGINT),
        "font": mpl.rcParams["font.size"],
        "modes": [m.training for m in modules],
        "hooks": [
            (len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs))
            for m in modules
        ],
        "flat": [id(w) for w in model.cell._flat_weights],
        "parameters": [id(p) for p in model.parameters()],
        "gradient": [id(p.grad) for p in model.parameters()],
        "buffers": [(id(b), b.tolist()) for b in model.buffers()],
        "plain": [sorted(vars(m)) for m in modules] + [id(model.scale)],
    }


def stand_ins(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


HOMES = (fisherlab, torch.backends, torch.nn.attention)
OURS = (
    *(str(Path(module.__file__).parent) for module in HOMES),
    contextlib.__file__,
    warnings.__file__,
)
CHANGES = {
    "kernels": (lambda m: view(m.eval(), None).settings(), None),
    "modes": (frozen, None),
    "parameters": (lambda m: swapped(m, stand_ins(m)), None),
    "gradients": (gradients_kept, lambda m: m.zero_grad()),
    "attributes": (plain_attributes_kept, lambda m: vars(m).update(cache=torch.ones(1))),
    "buffers": (
        lambda m: buffers_kept(m, always=True),
        lambda m: m.norm.running_mean.add_(1),
    ),
    "generator": (lambda _: generators_kept(torch.device("cpu"), 3), None),
    "order of sums": (lambda _: one_order(True), None),
    "style": (lambda _: publication(), None),
    "signals": (lambda _: held_interrupt(), None),
}


def passed(made, act, model):
    with made.pop():  # held by nothing else, as where it is written out
        if act is not None:
            act(model)


def interrupted(made, act, model, line):
    """Raise at one line, or entry of a function, of what a context does; tell if it was."""
    seen = 0

    def trace(frame, event, value):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(OURS):
            return None  # the checker of types has locks of its own
        if event in ("call", "line"):
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        passed(made, act, model)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("which", CHANGES)
def test_an_interrupt_anywhere_leaves_settings_as_they_were(which):
    model = Everything()
    change, act = CHANGES[which]
    passed([change(model)], act, model)  # what is imported then changes warnings
    made = [change(model)]
    expected, line = settings(model), 1
    while interrupted(made, act, model, line):
        assert settings(model) == expected, f"interrupted at event {line}"
        line, made = line + 1, [change(model)]
    assert settings(model) == expected
    assert line > 15
