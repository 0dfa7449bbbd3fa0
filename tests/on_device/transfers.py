"""How often each call makes the host wait for the device, and what it moves.

`python -m tests.on_device.transfers` prints the table of docs/transfers.md: the simulated
device, two layers, twelve examples, float64.
"""

from collections.abc import Callable, Iterator

import torch

import fisherlab as fl
from tests import simulated_device
from tests.on_device.both import LIKELIHOOD, data, network
from tests.on_device.test_training import optimiser
from tests.simulated_device import Moves

METHODS = ("kfac", "ekfac", "tkfac", "kpsvd", "kpsvd-2", "deflation", "kfac-corrected")
METHODS += ("mini-block", "diagonal", "shampoo-mean", "cg-fac", "kfac-tridiagonal")


def counted(action: Callable[[], object]) -> Moves:
    """Count a call that was made once before, so that nothing is set up in it."""
    action()
    with simulated_device.counted() as moves:
        action()
    return moves


def of_a_step(name: str, renewing: bool, place: torch.device) -> Moves:
    """Count a step of an optimiser that renews its curvature every third time."""
    x, y = (part.to(place) for part in data())
    settings = {"statistics_every": 3, "inverse_every": 3}
    chosen = optimiser(network().to(place), name, **settings)
    for _ in range(3 if renewing else 4):
        chosen.step(batch=(x, y))
    with simulated_device.counted() as moves:
        chosen.step(batch=(x, y))
    return moves


def of_calls(place: torch.device) -> Iterator[tuple[str, Moves]]:
    """Yield what each public call of the analysis counts."""
    batch = tuple(part.to(place) for part in data())
    model = network().to(place)
    stats = fl.collect(model, batch, LIKELIHOOD)
    exact, kfac = fl.ExactBlock()(stats["0"]), fl.KFAC()(stats["0"])
    calls: dict[str, Callable[[], object]] = {
        "`collect`": lambda: fl.collect(model, batch, LIKELIHOOD),
        "`mean_gradient`": lambda: fl.mean_gradient(model, batch, LIKELIHOOD),
        "`approximate`, kfac": lambda: fl.approximate(model, batch, LIKELIHOOD, ["kfac"]),
        "`fl.KFAC()(layer)`": lambda: fl.KFAC()(stats["0"]),
        "`metrics.frobenius_error`": lambda: fl.metrics.frobenius_error(exact, kfac),
        "`metrics.inverse_error`": lambda: fl.metrics.inverse_error(exact, kfac, 0.1),
        "`operator.solve`": lambda: kfac.solve(stats["0"].example_gradients()[0, 0], 0.1),
        "`compare`, kfac, one damping": lambda: fl.compare(stats, ["kfac"], damping=0.1),
        "`sweep`, kfac, three dampings": lambda: fl.sweep(
            stats, ["kfac"], damping=[1e-2, 1e-1, 1.0]
        ),
    }
    for name, action in calls.items():
        yield name, counted(action)


def table(place: torch.device) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| call | waits | numbers read | copies to host (bytes) | to device (bytes) |"
    yield "|---|---:|---:|---:|---:|"
    for name, moves in of_calls(place):
        yield _line(name, moves)
    for name in METHODS:
        yield _line(f"step between renewals, `{name}`", of_a_step(name, False, place))
    for name in METHODS:
        yield _line(f"step that renews, `{name}`", of_a_step(name, True, place))


def _line(name: str, moves: Moves) -> str:
    return (
        f"| {name} | {moves.synchronisations} | {moves.scalars} | {moves.to_host} "
        f"({moves.bytes_to_host}) | {moves.to_device} ({moves.bytes_to_device}) |"
    )


if __name__ == "__main__":
    print("\n".join(table(simulated_device.load())))
