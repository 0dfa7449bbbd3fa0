"""A KFAC step of ours beside those of singd and asdfghjkl (asdl), settings alike.

An MLP 784-256-64-10 and a small CNN in float32, the labels of the data (one backward pass
for all), factored damping, the same learning rate and momentum, statistics and inverses
every T steps. A step with T is put together from one that refreshes and one that does not;
at T = 1 ours makes triangles alone.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fisherlab as fl
from tests.benchmarks import peers
from tests.benchmarks.timing import interleaved

RATE, DAMPING, MOMENTUM, DECAY = 1e-6, 1e-2, 0.9, 0.95
NEVER, EVERY, AIM = 10**9, (1, 10, 100), 0.9
Action = Callable[[], Any]


def mlp(batch: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    sizes = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU()]
    return nn.Sequential(*sizes, nn.Linear(64, 10)), torch.randn(batch, 784)


def cnn(batch: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(16 * 49, 10)]
    return nn.Sequential(*layers), torch.randn(batch, 1, 28, 28)


def ours(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Action]:
    steps = {}
    for name, every, first in (("plain", NEVER, 1), ("refresh", NEVER, 0), ("each", 1, 1)):
        step = partial(_step, _optimiser(deepcopy(model)), x, y, every)
        step(0)
        steps[name] = partial(step, first)
    return steps


def _step(
    optimiser: fl.NaturalGradient, x: Tensor, y: Tensor, every: int, number: int
) -> None:
    optimiser.statistics_every = optimiser.inverse_every = every
    optimiser.steps = number
    optimiser.step(batch=(x, y))


def _optimiser(model: nn.Module) -> fl.NaturalGradient:
    return fl.NaturalGradient(
        model,
        fl.Categorical(),
        fl.KFAC(),
        RATE,
        fl.Factored(DAMPING),
        MOMENTUM,
        fl.Empirical(),
        average=DECAY,
    )


def singd(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Action]:
    """Dense K-FAC of singd; its second form never renews its factors."""
    from singd.optim.optimizer import SINGD

    found: dict[str, Action] = {}
    for name, every in (("plain", NEVER), ("refresh", 1)):
        here = deepcopy(model)
        optimiser = SINGD(
            here, lr=RATE, momentum=MOMENTUM, damping=DAMPING, T=every, kfac_like=True
        )

        def step(here: nn.Module = here, optimiser: Any = optimiser) -> None:
            optimiser.zero_grad()
            nn.functional.cross_entropy(here(x), y).backward()
            optimiser.step()

        step()
        found[name] = step
    return found


def asdl(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Action]:
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig
    from asdl.precondition import natural_gradient

    # Its marks for a profiler need CUDA.
    natural_gradient.nvtx = SimpleNamespace(range=lambda *_: nullcontext())
    found: dict[str, Action] = {}
    for name, every in (("plain", NEVER), ("refresh", 1)):
        here = deepcopy(model)
        config = PreconditioningConfig(
            data_size=len(x),
            damping=DAMPING,
            ema_decay=1 - DECAY,
            curvature_upd_interval=every,
            preconditioner_upd_interval=every,
        )
        maker = KfacGradientMaker(here, config, fisher_type=FISHER_EMP)
        sgd = torch.optim.SGD(here.parameters(), lr=RATE, momentum=MOMENTUM)

        def step(here: nn.Module = here, maker: Any = maker, sgd: Any = sgd) -> None:
            sgd.zero_grad()
            output = maker.setup_model_call(here, x)
            maker.setup_loss_call(nn.functional.cross_entropy, output, y)
            maker.forward_and_backward()
            sgd.step()

        step()
        found[name] = step
    return found


PEERS = {"singd": ("singd", singd), "asdl": ("asdl", asdl)}
NETWORKS = {"MLP 784-256-64-10": mlp, "CNN 8-16 of 28x28": cnn}


def measure(network: str, batch: int, rounds: int) -> dict[str, object]:
    """Time all in turn; a row as the other cases give."""
    model, x = NETWORKS[network](batch)
    y = torch.randint(0, 10, (batch,))
    rivals = {n: make for n, (package, make) in PEERS.items() if peers.installed(package)}
    steps = {name: make(deepcopy(model), x, y) for name, make in rivals.items()}
    steps["fisherlab"] = ours(deepcopy(model), x, y)
    work = {f"{n}: {part}": act for n, both in steps.items() for part, act in both.items()}
    found = interleaved(work, rounds)
    parts = {n: {part: found[f"{n}: {part}"] for part in both} for n, both in steps.items()}
    seconds, targets = {}, {}
    for every in EVERY:
        here = {n: _mean_seconds(both, every) for n, both in parts.items()}
        seconds |= {f"{n}, T={every}": round(value, 5) for n, value in here.items()}
        for name in rivals:
            ratio = here["fisherlab"] / here[name]
            targets[f"step / {name}, T={every}"] = {
                "measured": round(ratio, 3),
                "aim": AIM,
                "met": ratio <= AIM,
            }
    return {
        "case": f"a KFAC step beside others, {network}, batch {batch}, float32",
        "note": "labels of the data, factored damping; statistics and inverses every T",
        "seconds": seconds,
        "times_ours": {},
        "targets": targets,
    }


def _mean_seconds(parts: dict[str, float], every: int) -> float:
    if every == 1:
        return parts.get("each", parts["refresh"])
    return parts["plain"] + (parts["refresh"] - parts["plain"]) / every


TABLES = {
    "peer-steps-mlp": partial(measure, "MLP 784-256-64-10", 128),
    "peer-steps-cnn": partial(measure, "CNN 8-16 of 28x28", 128),
}
