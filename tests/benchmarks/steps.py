"""Time of optimiser steps relative to SGD with momentum, on the MNIST autoencoder.

A step with T₁, T₂ is put together from three timed ones: without statistics, with
statistics, and with statistics and new inverses. All contestants run in turn.
"""

import argparse
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fisherlab as fl
from tests.benchmarks import peers
from tests.benchmarks.timing import interleaved

WIDTHS = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
RATE = 1e-6  # the weights are to stay where they are
NEVER = 10**9
LIKELIHOOD = fl.Bernoulli()
Action = Callable[[], Any]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Parameters
    ----------
    make
        From a model to an optimiser.
    schedules
        (T₁, T₂) to the ratio aimed for at batch 1000 and at batch 512, or None.
    """

    make: Callable[[nn.Module], fl.NaturalGradient]
    schedules: Mapping[tuple[int, int], tuple[float | None, float | None]]


def natural(method: Any, model: nn.Module, **settings: Any) -> fl.NaturalGradient:
    options = {"lr": RATE, "damping": fl.Factored(0.3), "average": fl.Ramped(0.95)}
    return fl.NaturalGradient(model, LIKELIHOOD, method, **(options | settings))


SHARED = fl.MiniBlock(statistic="mean_gradient", spatial_average=True)
METHODS = {
    "KFAC": Method(
        partial(natural, fl.KFAC()), {(100, 100): (1.8, 2.5), (1, 20): (3.2, 4.0)}
    ),
    "KFAC, quarter batch": Method(
        partial(natural, fl.KFAC(), statistics_fraction=0.25), {(1, 20): (2.5, None)}
    ),
    "KPSVD": Method(partial(natural, fl.KPSVD()), {(100, 100): (1.8, 2.5)}),
    "deflation": Method(partial(natural, fl.Deflation()), {(100, 100): (2.6, 4.3)}),
    "KFAC-corrected": Method(
        partial(natural, fl.KFACCorrected()), {(100, 100): (2.6, 4.3)}
    ),
    "MBF, spatial average": Method(
        partial(natural, SHARED, damping=3e-4, momentum_of="gradient"),
        {(100, 100): (1.5, 2.0)},
    ),
}


def autoencoder(widths: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def images(examples: int, size: int) -> Tensor:
    """Real digits where they are at hand and of that size, else noise."""
    try:
        found = fl.problems.load("mnist-autoencoder", dtype=torch.float32).train[0]
    except fl.DataError:
        found = torch.empty(0, 0)
    if found.shape[1:] != (size,):
        drawn = torch.Generator("cpu").manual_seed(0)
        found = torch.rand(examples, size, generator=drawn, device="cpu")
    return found[:examples].contiguous().to(torch.get_default_device())


class HookKFAC:
    """KFAC as it is usually written: hooks, full products, dense inverses."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model if isinstance(m, nn.Linear)]
        self.model, self.watching = model, False
        self.sgd = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        self.inputs: dict[nn.Module, Tensor] = {}
        self.factors: dict[nn.Module, list[Tensor]] = {}
        self.inverses: dict[nn.Module, list[Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        if self.watching:
            self.inputs[layer] = args[0].detach()
            output.register_hook(partial(self._note, layer))

    def _note(self, layer: nn.Module, gradient: Tensor) -> None:
        if not self.watching:
            return
        a, g = self.inputs[layer], gradient * len(gradient)
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        new = [g.T @ g / len(g), a.T @ a / len(a)]
        old = self.factors.get(layer, new)
        self.factors[layer] = [0.95 * x + 0.05 * y for x, y in zip(old, new, strict=True)]

    def step(self, x: Tensor, *, statistics: bool, inverses: bool) -> None:
        self.sgd.zero_grad()
        self.watching = statistics
        output = self.model(x)
        if statistics:
            labels = torch.bernoulli(output.detach().sigmoid())
            LIKELIHOOD.loss(output, labels).mean().backward(retain_graph=True)
            self.watching = False
            self.sgd.zero_grad()
        LIKELIHOOD.loss(output, x).mean().backward()
        for layer in self.layers:
            if inverses:
                self.inverses[layer] = [
                    torch.linalg.inv(f + 0.5 * torch.eye(len(f), device=f.device))
                    for f in self.factors[layer]
                ]
            rows, cols = self.inverses[layer]
            grad = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            move = rows @ grad @ cols
            layer.weight.grad.copy_(move[:, :-1])
            layer.bias.grad.copy_(move[:, -1])
        self.sgd.step()


def first_order_step(kind: Callable[..., Any], model: nn.Module, x: Tensor) -> Action:
    optimiser = kind(model.parameters(), lr=RATE)

    def step() -> None:
        optimiser.zero_grad()
        LIKELIHOOD.loss(model(x), x).mean().backward()
        optimiser.step()

    return step


def three_steps(optimiser: fl.NaturalGradient, x: Tensor) -> dict[str, Action]:
    """Return steps without anything, with statistics, and with inverses as well."""

    def step(statistics: int, inverses: int) -> None:
        optimiser.statistics_every, optimiser.inverse_every = statistics, inverses
        optimiser.steps = 1
        optimiser.step(batch=(x, x))

    step(1, 1)
    return {
        "plain": partial(step, NEVER, NEVER),
        "statistics": partial(step, 1, NEVER),
        "inverses": partial(step, 1, 1),
    }


def hook_steps(model: nn.Module, x: Tensor) -> dict[str, Action]:
    kfac = HookKFAC(model)
    kfac.step(x, statistics=True, inverses=True)
    return {
        "plain": partial(kfac.step, x, statistics=False, inverses=False),
        "statistics": partial(kfac.step, x, statistics=True, inverses=False),
        "inverses": partial(kfac.step, x, statistics=True, inverses=True),
    }


def singd_steps(model: nn.Module, x: Tensor) -> dict[str, Action]:
    from singd.optim.optimizer import SINGD

    found: dict[str, Action] = {}
    for name, every in (("plain", NEVER), ("inverses", 1)):
        here = autoencoder(_widths(model))
        options = {"kfac_like": True, "structures": ("dense", "dense"), "T": every}
        optimiser = SINGD(here, lr=RATE, loss_average="batch", **options)

        def step(here: nn.Module = here, optimiser: Any = optimiser) -> None:
            optimiser.zero_grad()
            LIKELIHOOD.loss(here(x), x).mean().backward()
            optimiser.step()

        step()
        found[name] = step
    found["statistics"] = found["inverses"]  # it does both at once
    return found


def _widths(model: nn.Module) -> list[int]:
    linear = [m for m in model if isinstance(m, nn.Linear)]
    return [linear[0].in_features, *(m.out_features for m in linear)]


def joined(parts: Mapping[str, float], every: int, refresh: int) -> float:
    """Return the mean of a step with T₁ and T₂ (a multiple of T₁) from its parts."""
    observed = (parts["statistics"] - parts["plain"]) / every
    renewed = (parts["inverses"] - parts["statistics"]) / refresh
    return parts["plain"] + observed + renewed


def flops(action: Action) -> float:
    """Count the operations of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        action()
    return float(counter.get_total_flops())


def contestants(
    batch: int, widths: list[int], neighbours: bool
) -> tuple[dict[str, dict[str, Action]], dict[str, Action]]:
    """Return the parts of the steps of all methods, and the steps of first order."""
    x = images(batch, widths[0])
    steps = {
        name: three_steps(m.make(autoencoder(widths)), x) for name, m in METHODS.items()
    }
    steps["hook KFAC"] = hook_steps(autoencoder(widths), x)
    if neighbours and peers.installed("singd"):
        steps["singd"] = singd_steps(autoencoder(widths), x)
    momentum = partial(torch.optim.SGD, momentum=0.9)
    sgd = first_order_step(momentum, autoencoder(widths), x)
    adam = first_order_step(torch.optim.Adam, autoencoder(widths), x)
    return steps, {"SGD-m": sgd, "Adam": adam}


def measure(
    batch: int,
    rounds: int,
    widths: list[int] | None = None,
    *,
    neighbours: bool = True,
    device: str = "cpu",
) -> dict[str, object]:
    """Time all methods in turn, in float32; return a row as the other cases do."""
    with torch.device(device):  # no longer: a default device slows every call of torch
        steps, first = contestants(batch, widths or WIDTHS, neighbours)
    sgd = first["SGD-m"]
    sgd()
    work = {
        f"{n}: {part}": act for n, parts in steps.items() for part, act in parts.items()
    }
    seconds = interleaved(first | work, rounds)
    counted = {name: flops(act) / flops(sgd) for name, act in work.items()}
    rows, found = {}, {}
    for name, schedule in _rows(steps):
        parts = {p: seconds[f"{name}: {p}"] for p in steps[name]}
        operations = {p: counted[f"{name}: {p}"] for p in steps[name]}
        label = f"{name}, T1={schedule[0]}, T2={schedule[1]}"
        rows[label] = joined(parts, *schedule)
        ratio = joined(operations, *schedule)
        if name in METHODS:
            found[f"{label} / SGD-m ({ratio:.2f} of its flops)"] = _target(
                rows[label] / seconds["SGD-m"], name, schedule, batch
            )
    found |= _against_others(rows)
    return {
        "case": f"optimiser steps, MNIST autoencoder, batch {batch}, float32",
        "note": "seconds of one step; statistics and inverses shared out over T1 and T2",
        "seconds": {name: round(seconds[name], 4) for name in ("SGD-m", "Adam")}
        | {name: round(value, 4) for name, value in rows.items()},
        "times_ours": {},
        "targets": found,
    }


def _rows(steps: Mapping[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    ours = [(n, schedule) for n, m in METHODS.items() for schedule in m.schedules]
    others = [name for name in steps if name not in METHODS]
    return ours + [(n, s) for n in others for s in METHODS["KFAC"].schedules]


def _target(
    value: float, name: str, schedule: tuple[int, int], batch: int
) -> dict[str, object]:
    aims = METHODS[name].schedules[schedule]
    aim = aims[1] if batch == 512 else aims[0]
    met = aim is None or value <= aim
    return {"measured": round(value, 3), "aim": aim or float("inf"), "met": met}


def _against_others(rows: Mapping[str, float]) -> dict[str, object]:
    """Hold our KFAC against the other implementations, schedule by schedule."""
    found: dict[str, object] = {}
    for schedule in METHODS["KFAC"].schedules:
        ending = f", T1={schedule[0]}, T2={schedule[1]}"
        for other in ("hook KFAC", "singd"):
            if other + ending in rows:
                value = rows["KFAC" + ending] / rows[other + ending]
                found[f"KFAC / {other}{ending}"] = {
                    "measured": round(value, 3),
                    "aim": 1.0,
                    "met": value <= 1,
                }
    return found


TABLES = {"steps1000": partial(measure, 1000), "steps512": partial(measure, 512)}


def main() -> None:
    """Print one table, or a small one that only shows that everything runs."""
    from tests.benchmarks.__main__ import show

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    widths = [20, 16, 6, 16, 20] if arguments.tiny else None
    show(measure(arguments.batch, arguments.rounds, widths))


if __name__ == "__main__":
    main()
