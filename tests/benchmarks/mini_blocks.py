"""Steps of mini-block Fisher beside Adam, KFAC and Shampoo: time, memory, growth.

python -m tests.benchmarks.mini_blocks [autoencoder cnn growth] [--small] [--save NAME]

Times are ratios to a step of torch's Adam, all contestants interleaved. A contestant's
action is one whole period of its inverses, so that a step pays its share of them. The
curvature's own exponents in the width d and the batch N stand beside those of the
paper's complexity table.
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.layers import Block
from fisherlab.problems.networks import perceptron, simple_cnn
from fisherlab.statistics import MeanGradient
from tests.benchmarks.__main__ import RESULTS, machine
from tests.benchmarks.timing import interleaved

AUTOENCODER = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
SMALL_AUTOENCODER = [20, 16, 8, 16, 20]
TARGETS = {
    "MBF T1=1 T2=20": 1.8,
    "MBF T1=100 T2=100": 1.4,
    "MBF convolutions, torch's Adam on fc T1=1 T2=20": 1.1,
}
Step = Callable[[], Any]


def adam_steps(model: nn.Module, likelihood: Any, batch: Any, lr: float) -> Step:
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        likelihood.loss(model(batch[0]), batch[1]).mean().backward()
        optimiser.step()

    step.optimiser = optimiser  # type: ignore[attr-defined]
    return step


def natural_steps(
    model: nn.Module,
    likelihood: Any,
    batch: Any,
    method: Any,
    t1: int,
    t2: int,
    **more: Any,
) -> Step:
    settings = {"lr": 1e-6, "damping": 3e-4, "average": 0.9, "momentum_of": "gradient"}
    optimiser = fl.NaturalGradient(
        model,
        likelihood,
        method,
        statistics_every=t1,
        inverse_every=t2,
        **(settings | more),
    )

    def step() -> None:
        optimiser.step(batch=batch)

    step.optimiser = optimiser  # type: ignore[attr-defined]
    return step


def convolution_steps(
    model: nn.Module, likelihood: Any, batch: Any, t1: int, t2: int
) -> Step:
    """Mini-blocks for the convolutions, through operators; torch's Adam for the rest."""
    blocks = {n: b for n, b in fl.blocks(model).items() if n.startswith("conv")}
    parameters = dict(model.named_parameters())
    names = {name for block in blocks.values() for name in block.parameters}
    adam = torch.optim.Adam([p for n, p in parameters.items() if n not in names], lr=1e-6)
    method, state, inverses, momenta = fl.MiniBlock("mean_gradient"), {}, {}, {}
    count = itertools.count()

    @torch.no_grad()
    def moved(number: int) -> None:
        for name, block in blocks.items():
            gradient = block.pack({n: parameters[n].grad for n in block.parameters})
            kept = momenta.get(name)
            momenta[name] = gradient if kept is None else 0.9 * kept + gradient
            if number % t1 == 0:
                new = method(MeanGradient(block, gradient, len(batch[0])))
                old = state.get(name)
                state[name] = new.formed if old is None else fl.average(old, new, 0.9)
            if number % t2 == 0:
                inverses[name] = state[name].inverse(3e-3)
            direction = block.unpack(inverses[name] @ momenta[name])
            for parameter, part in direction.items():
                parameters[parameter].sub_(part, alpha=1e-6)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        likelihood.loss(model(batch[0]), batch[1]).mean().backward()
        moved(next(count))
        adam.step()

    step.optimiser = adam  # type: ignore[attr-defined]
    step.held = (state, inverses, momenta)  # type: ignore[attr-defined]
    return step


def repeated(step: Step, times: int) -> Step:
    def action() -> None:
        for _ in range(times):
            step()

    return action


def held_bytes(step: Any) -> dict[str, int]:
    """Bytes between steps: momenta and second moments, averages, inverses."""
    optimiser = step.optimiser
    state = sum(
        value.numel() * value.element_size()
        for held in optimiser.state.values()
        for value in held.values()
        if isinstance(value, Tensor)
    )
    averages = inverses = 0
    for unit in getattr(optimiser, "units", {}).values():
        averages += tensor_bytes(unit.operator)
        inverses += tensor_bytes(unit.inverse)
    if hasattr(step, "held"):
        averages, inverses, momenta = (tensor_bytes(part) for part in step.held)
        state += momenta
    return {"state": state, "averages": averages, "inverses": inverses}


def tensor_bytes(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all tensors that a value holds, each storage once."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        place = value.untyped_storage().data_ptr()
        if place in seen:
            return 0
        seen.add(place)
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return sum(tensor_bytes(part, seen) for part in value)
    if hasattr(value, "__dict__"):
        return sum(tensor_bytes(part, seen) for part in vars(value).values())
    return 0


def images(examples: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(examples, *shape, generator=generator)


def large_shared(model: nn.Module, statistic: str, largest: int) -> fl.MethodByBlock:
    """One shared block for the layers whose blocks would hold more than `largest`."""
    shared = fl.MiniBlock(statistic, spatial_average=True)
    blocks = fl.blocks(model).items()
    numbers = {name: b.weight_shape[0] * b.weight_shape[1] ** 2 for name, b in blocks}
    chosen = {name: shared for name, count in numbers.items() if count > largest}
    return fl.MethodByBlock(fl.MiniBlock(statistic), chosen)


def autoencoder(small: bool) -> dict[str, tuple[Step, int]]:
    """MBF on the MNIST autoencoder at batch 1000, large layers spatially averaged."""
    widths = SMALL_AUTOENCODER if small else AUTOENCODER
    build = partial(perceptron, widths, "relu", linear=(len(widths) // 2,))
    x = images(50 if small else 1000, widths[0])
    batch, likelihood = (x, x), fl.Bernoulli()

    def fresh() -> nn.Module:
        return build(seed=0, dtype=torch.float32)

    mbf = large_shared(fresh(), "mean_gradient", 100 if small else 2_000_000)
    run = partial(natural_steps, likelihood=likelihood, batch=batch)
    kfac = {"damping": fl.Factored(0.3, pi=1.0), "fisher": fl.MonteCarlo(1)}
    shampoo = fl.ShampooPreconditioner(3e-4)
    return {
        "Adam": (adam_steps(fresh(), likelihood, batch, 1e-6), 20),
        "MBF T1=1 T2=20": (run(fresh(), method=mbf, t1=1, t2=20), 20),
        "MBF T1=100 T2=100": (run(fresh(), method=mbf, t1=100, t2=100), 100),
        "KFAC T1=1 T2=20": (run(fresh(), method="kfac", t1=1, t2=20, **kfac), 20),
        "Shampoo T1=1 T2=20": (
            run(fresh(), method=shampoo, t1=1, t2=20, damping=0.0),
            20,
        ),
    }


def cnn(small: bool) -> dict[str, tuple[Step, int]]:
    """MBF on the Simple CNN at batch 128; its large layer fc1 in two ways."""
    examples, likelihood = (8 if small else 128), fl.Categorical()
    batch = images(examples, 1, 28, 28), torch.arange(examples) % 10

    def fresh() -> nn.Module:
        return simple_cnn(dtype=torch.float32)

    mini, adam = fl.MiniBlock("mean_gradient"), fl.AdamPreconditioner()
    dense = {"fc1": adam, "fc2": adam}
    shared = {name: fl.MiniBlock("mean_gradient", spatial_average=True) for name in dense}
    run = partial(natural_steps, likelihood=likelihood, batch=batch)
    only, every = (fl.MethodByBlock(mini, d) for d in (dense, shared))
    found = {
        "Adam": (adam_steps(fresh(), likelihood, batch, 1e-6), 20),
        "MBF convolutions, torch's Adam on fc T1=1 T2=20": (
            convolution_steps(fresh(), likelihood, batch, 1, 20),
            20,
        ),
        "all Adam, by fisherlab T1=1 T2=1": (run(fresh(), method=adam, t1=1, t2=1), 20),
        "MBF convolutions T1=1 T2=20": (run(fresh(), method=only, t1=1, t2=20), 20),
        "MBF convolutions T1=10 T2=100": (run(fresh(), method=only, t1=10, t2=100), 100),
    }
    if not small:
        found["MBF all, fc shared T1=10 T2=100"] = (
            run(fresh(), method=every, t1=10, t2=100),
            100,
        )
    return found


def report(name: str, steps: dict[str, tuple[Step, int]], rounds: int) -> dict[str, Any]:
    actions = {label: repeated(step, times) for label, (step, times) in steps.items()}
    seconds = interleaved(actions, rounds)
    per_step = {label: seconds[label] / times for label, (_, times) in steps.items()}
    rows = {}
    for label, (step, _) in steps.items():
        ratio = per_step[label] / per_step["Adam"]
        aim = TARGETS.get(label)
        rows[label] = {
            "milliseconds": round(1e3 * per_step[label], 3),
            "times_adam": round(ratio, 3),
            "bytes": held_bytes(step),
            "aim": aim,
            "met": None if aim is None else bool(ratio <= aim),
        }
        print(f"{name:12s} {label:48s} {rows[label]}")
    return rows


# --- growth: the curvature of one d × d layer alone ---


def curvature(method: str, d: int, n: int) -> Callable[[], Any]:
    """Statistics, inverse and one direction for a layer with d inputs and d outputs."""
    generator = torch.Generator().manual_seed(0)
    block = Block("layer", "w", None, (d, d), d)
    mean = MeanGradient(block, torch.randn(d, d, generator=generator), n)
    if method == "Adam":
        adam = fl.AdamPreconditioner()
        return lambda: adam(mean).solve(mean.gradient, 1e-4)
    if method == "Shampoo":
        shampoo = fl.ShampooPreconditioner(1e-4)
        return lambda: shampoo(mean).solve(mean.gradient, 0.0)
    if method.startswith("MBF"):
        mini = fl.MiniBlock("mean_gradient", spatial_average="shared" in method)
        return lambda: mini(mean).inverse(1e-2) @ mean.gradient
    inputs, gradients = (torch.randn(n, 1, d, generator=generator) for _ in range(2))

    def kfac() -> Tensor:
        stats = fl.LayerStatistics(block, n, inputs, gradients[None], positions=n)
        return fl.KFAC()(stats).inverse(fl.Factored(1e-2)) @ mean.gradient

    return kfac


GROWTH = {  # method: exponents of d in the statistic, the inverse and the step (table D8)
    "Adam": (2, None, 2),
    "MBF": (3, 4, 3),
    "MBF shared": (3, 3, 3),
    "Shampoo": (3, 3, 3),
    "KFAC": (2, 3, 3),
}


def growth(small: bool, rounds: int) -> dict[str, Any]:
    """Fit log-log slopes in d at fixed N and in N at fixed d."""
    widths = [8, 16] if small else [64, 128, 256]
    wide = [8, 16] if small else [256, 512, 1024]
    batches = [8, 16] if small else [1000, 4000, 16000]
    rows = {}
    for method, exponents in GROWTH.items():
        sizes = widths if method == "MBF" else wide
        by_d = {str(d): curvature(method, d, 128) for d in sizes}
        by_n = {str(n): curvature(method, sizes[0], n) for n in batches}
        row = {
            "slope_in_d": slope(interleaved(by_d, rounds)),
            "slope_in_n": slope(interleaved(by_n, rounds)),
            "table_in_d": exponents,
        }
        rows[method] = row
        print(f"growth       {method:48s} {row}")
    return rows


def slope(seconds: dict[str, float]) -> float:
    points = [(math.log(float(k)), math.log(v)) for k, v in seconds.items()]
    x, y = (
        torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True)
    )
    x, y = x - x.mean(), y - y.mean()
    return round(float((x * y).sum() / x.square().sum()), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="among autoencoder, cnn, growth")
    parser.add_argument("--small", action="store_true", help="only see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    rounds = 1 if arguments.small else arguments.rounds
    runs: dict[str, Callable[[], Any]] = {
        "autoencoder": lambda: report("autoencoder", autoencoder(arguments.small), rounds),
        "cnn": lambda: report("cnn", cnn(arguments.small), rounds),
        "growth": lambda: growth(arguments.small, rounds),
    }
    unknown = [part for part in arguments.parts if part not in runs]
    if unknown:
        parser.error(f"unknown parts {unknown}; known: {', '.join(runs)}")
    found = {part: runs[part]() for part in arguments.parts or runs}
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{arguments.save}.json"
        text = json.dumps({"machine": machine(), **found}, indent=1)
        partial_file = file.with_suffix(".part")
        partial_file.write_text(text + "\n")
        os.replace(partial_file, file)
        print(f"\nwritten: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
