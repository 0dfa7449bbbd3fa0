"""What ten minutes on an accelerator bring home, part by part: `make gpu`.

`python -m tests.benchmarks.accelerator --device cuda [part ...]`. Every part writes
results/NAME.json at once, under the name of the device, so that a run that is cut short
keeps what it has. `--tiny` is the rehearsal: the same lines at a size that any device, the
simulated one too, is through with in a minute.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fisherlab as fl
from tests import simulated_device
from tests.benchmarks import cases, kronecker, reports, steps
from tests.benchmarks.__main__ import machine, measured, save, show
from tests.benchmarks.timing import gemm, interleaved

Row = dict[str, Any]
REHEARSED = Path("build") / "rehearsed.json"
AIMS = {
    "KFAC": 1.22,
    "KPSVD": 1.21,
    "deflation": 1.33,
    "KFAC-corrected": 1.31,
    "MBF, spatial average": 1.15,
}
RUNNERS = ("sgd-momentum", "adam", "kfac-koroko", "kpsvd-koroko", "deflation-koroko")
RUNNERS += ("lanczos-koroko", "kfac-corrected-koroko")


@dataclass(frozen=True)
class Plan:
    """How large everything is."""

    rounds: int = 5
    width: int = 64
    examples: int = 4000
    images: int = 512
    widths: tuple[int, ...] = (784, 256, 64, 10)
    autoencoder: tuple[int, ...] = tuple(steps.WIDTHS)
    square: int = 8192
    seconds: float = 85.0
    race: str = "mnist-autoencoder-koroko"
    neighbours: bool = True


TINY = Plan(1, 8, 40, 4, (20, 12, 6, 3), (20, 16, 6, 16, 20), 64, 0.5, "digits", False)


def peak(plan: Plan, device: str) -> Iterator[Row]:
    """The rate of matrix products, which all counts are held against."""
    n = plan.square
    dtypes = torch.float64, torch.float32
    with torch.device(device):
        work = {str(dtype): gemm([(n, n, n)], dtype) for dtype in dtypes}
    seconds = interleaved(work, plan.rounds)
    told = ", ".join(f"{2 * n**3 / s / 1e12:.3g} Tflop/s {k}" for k, s in seconds.items())
    yield _row(f"matrix products of {n} rows", told, seconds)


def blocks(plan: Plan, device: str) -> Iterator[Row]:
    """Dense blocks of a perceptron and of convolutions, and KFAC's factors."""
    with torch.device(device):  # no longer: a default device slows every call of torch
        made = [
            cases.dense_mlp(plan.width, plan.examples),
            cases.conv(plan.images),
            *(
                cases.kfac(dtype, aim, 2 * plan.examples, list(plan.widths))
                for dtype, aim in ((torch.float64, 0.6), (torch.float32, 0.5))
            ),
        ]
    for case in made:
        rivals = _working(case.rivals) if plan.neighbours else {}
        yield measured(replace(case, rivals=rivals), plan.rounds)


def _working(rivals: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Leave out neighbours that do not run on this device, and say so."""
    found = {}
    for name, action in rivals.items():
        try:
            action()
        except Exception as error:  # whatever a neighbour raises
            print(f"  {name} is left out: {type(error).__name__}: {error}"[:200])
        else:
            found[name] = action
    return found


def comparison(plan: Plan, device: str) -> Iterator[Row]:
    """Approximations of the widest layer, and five errors of it, from one statistics."""
    o, i = plan.autoencoder[1], plan.autoencoder[0] + 1
    for dtype in (torch.float64, torch.float32):
        layer = kronecker._synthetic(o, i, 1000, dtype).to(device)
        work = {
            name: partial(kronecker._fresh_call, method, layer)
            for name, method in {
                "KFAC": fl.KFAC(),
                "EKFAC": fl.EKFAC(),
                "KPSVD": fl.KPSVD(),
                "KPSVD rank 2": fl.KPSVD(2),
                "mini-blocks": fl.MiniBlock(),
            }.items()
        }
        work["five errors"] = partial(cases.five_errors, {"layer": layer})
        seconds = interleaved(work, plan.rounds)
        note = "from statistics that are there; random inputs and gradients"
        yield _row(f"approximations of a {o}×{i} layer, N=1000, {dtype}", note, seconds)


def training_steps(plan: Plan, device: str) -> Iterator[Row]:
    """Seconds of a step relative to SGD's, statistics and inverses every 100 steps."""
    widths = list(plan.autoencoder)
    options: Any = {"neighbours": plan.neighbours, "device": device}
    row = steps.measure(1000, plan.rounds, widths, **options)
    sgd = row["seconds"]["SGD-m"]
    ratios = {
        name: row["seconds"][f"{name}, T1=100, T2=100"] / max(sgd, 1e-9) for name in AIMS
    }
    row["targets"] = {
        f"{name} / SGD-m": {
            "measured": round(ratio, 3),
            "aim": AIMS[name],
            "met": ratio <= AIMS[name],
        }
        for name, ratio in ratios.items()
    }
    yield row


def training(plan: Plan, device: str) -> Iterator[Row]:
    """Losses of seven optimisers after the same time on the MNIST autoencoder."""
    reports.stand_in(plan.race)
    for name in RUNNERS:
        problem = fl.problems.load(plan.race, dtype=torch.float32)
        problem = problem.to(device)
        started = time.perf_counter()
        run = fl.follow(problem, name, steps=10**6, seconds=plan.seconds, batch_size=512)
        took = time.perf_counter() - started
        loss, last = float(run["train_loss"][-1]), int(run["step"][-1])
        yield _row(
            f"{name} on {problem.name}, {plan.seconds:g} s",
            f"training loss {loss:.4f} after {last:,} steps of 512 examples",
            {"whole run": took},
        ) | {"train_loss": loss, "steps": last}


PARTS = {
    "peak": peak,
    "blocks": blocks,
    "comparison": comparison,
    "steps": training_steps,
    "training": training,
}


def _row(case: str, note: str, seconds: Mapping[str, float]) -> Row:
    rounded = {name: round(value, 5) for name, value in seconds.items()}
    return {"case": case, "note": note, "seconds": rounded, "times_ours": {}, "targets": {}}


def main() -> int:
    """Run the parts that are asked for, writing each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"among {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearse: everything small")
    parser.add_argument("--out", type=Path, help="the file, instead of one in results/")
    asked = parser.parse_args()
    if asked.device != "cpu" and (why := simulated_device.missing(asked.device)):
        parser.error(why)
    out = asked.out or (REHEARSED if asked.tiny else None)
    plan = TINY if asked.tiny else Plan()
    for name in asked.parts or PARTS:
        for row in PARTS[name](plan, asked.device):
            show(row)
            save(machine(asked.device), [row], out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
