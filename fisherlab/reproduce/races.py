"""Races of optimisers at the settings that papers chose, in the papers' units.

The settings of Koroko et al. are for losses that are means over the outputs: recipes
translate those of their methods, and the rate of SGD is divided here. Weights of Bahamou et
al. begin as torch's layers do. Martens & Grosse's logistic units, sparse first weights,
λ = 150 and growing batches come from a public code of Algorithm 2; the rate of SGD is the
best of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import torch

from fisherlab.training.schedules import BatchSize, ExponentialBatches

FRESH: Final = "mbf-shared, inverses of every step"  # a control; the paper has T₂ = 20
Runners = Mapping[str, Mapping[str, Any]]


@final
@dataclass(frozen=True)
class Race:
    """Optimisers at their settings on one problem.

    Parameters
    ----------
    problem, outputs
        By name; the losses are divided by so many outputs, 1 where the paper sums.
    batch
        Examples in a minibatch.
    runners
        Settings by the name of the recipe, up to a comma; ``batch`` there is its own.
        Where ``lr`` is several rates, that of the lowest last training loss is taken.
    steps
        Quick, and the paper's.
    default_weights
        Begin with torch's weights instead of the problem's.
    dtype
        Of weights and data.
    looks
        How often losses are measured.
    others
        Problems that it can take instead, each with what else is another there.
    falls
        After how many epochs a rate falls to its tenth, by optimiser.
    """

    problem: str
    outputs: int
    batch: BatchSize
    runners: Runners
    steps: tuple[int, int]
    default_weights: bool = False
    dtype: torch.dtype = torch.float32
    looks: int = 20
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    falls: Mapping[str, int] = field(default_factory=dict)

    def of(self, problem: str) -> Race:
        """Return the race on another problem."""
        return replace(self, problem=problem, **self.others.get(problem, {}))


def _koroko(kfac: tuple[float, ...], sgd: float) -> Runners:
    """Return the tuned (lr, λ) of KFAC, KPSVD, DEFLATION, CORRECTED and LANCZOS."""
    names = ("kfac", "kpsvd", "deflation", "kfac-corrected", "lanczos")
    pairs = zip(kfac[::2], kfac[1::2], strict=True)
    found: dict[str, Mapping[str, float]] = {
        f"{name}-koroko": {"lr": lr, "damping": damping}
        for name, (lr, damping) in zip(names, pairs, strict=True)
    }
    return found | {"adam": {"lr": 1e-3}, "sgd-momentum": {"lr": sgd}}


def _goldfarb(
    problem: str,
    tuned: Mapping[str, tuple[float, float]],
    adam: tuple[float, float],
    sgd: float,
    steps: tuple[int, int],
) -> Race:
    """Return the race of Bahamou et al. at the tuned (lr, λ), (lr, ε) and lr."""
    names = {"mbf": "mbf-shared", "kfac": "kfac-goldfarb", "shampoo": "shampoo"}
    found: dict[str, Mapping[str, Any]] = {
        names[name]: {"lr": lr, "damping": damping} for name, (lr, damping) in tuned.items()
    }
    found[FRESH] = {**found["mbf-shared"], "inverse_every": 1}
    found["adam"] = {"lr": adam[0], "eps": adam[1]}
    found["sgd-momentum"] = {"lr": sgd}
    return Race(problem, 1, 1000, found, steps, default_weights=True)


RATES: Final = (3e-4, 3e-3, 3e-2)  # of SGD
START: Final = 150.0  # λ of K-FAC
ADAPTIVE: Final[Runners] = {
    "kfac-full": {"damping": START},
    "kfac-full-tridiagonal": {"damping": START},
    "sgd-nesterov": {"lr": RATES},
}
NO_MOMENTUM: Final = "kfac-full, no momentum"
SMALL: Final = ", batch 250"  # beside the race's own, four times as large
FAMILIES: Final = ("kfac-full", "sgd-nesterov")
BATCHES: Final[Runners] = {
    f"{name}{said}": {**ADAPTIVE[name], **own}
    for name in FAMILIES
    for said, own in (("", {}), (SMALL, {"batch": 250}))
}
_MBF: Final = {"lr": 1e-3, "damping": 0.1}  # the best of `mbf-settings` there
VARIANTS: Final[Runners] = {
    "mbf": _MBF,
    "mbf-true": _MBF,
    "mbf-shared": _MBF,
    "mbf, inverses of every step": {**_MBF, "inverse_every": 1},
    "mbf, inverses every 100": {**_MBF, "inverse_every": 100},
    "mbf, statistics every 10": {**_MBF, "statistics_every": 10},
}
_RARELY: Final = {"statistics_every": 10, "inverse_every": 100}
_EVERY_STEP: Final = {
    "statistics_every": 1,
    "inverse_every": 1,
    "average": 0.0,
    "burn_in": 0,
}


def _convolutional(lr: float, weight_decay: float) -> Runners:
    """Return MBF at its published rate and decay, and the others at ours."""
    mbf = {"lr": lr, "damping": 3e-3, "weight_decay": weight_decay, **_RARELY}
    return {
        "mbf": mbf,
        "kfac-eigen": {"lr": 1e-2, "damping": 0.03},
        "shampoo": {"lr": 1e-3, "damping": 3e-4, **_RARELY},
        "adam": {"lr": 1e-3},
        "sgd-momentum": {"lr": 0.1, "weight_decay": 5e-4},
    }


def _falls(mbf: int, kronecker: int) -> Mapping[str, int]:
    second = {"mbf": mbf, "kfac-eigen": kronecker, "shampoo": kronecker}
    return {**second, "adam": 40, "sgd-momentum": 40}


RACES: Final = {
    "kpsvd-published-curves": Race(
        "curves-surrogate-autoencoder-koroko",
        784,
        256,
        _koroko((0.1, 0.003, 0.1, 0.003, 0.1, 0.1, 0.1, 0.03, 0.001, 0.001), 0.3 / 784),
        (120, 12_600),
    ),
    "kpsvd-published-mnist": Race(
        "mnist-autoencoder-koroko",
        784,
        512,
        _koroko((0.01, 1e-4, 0.01, 1e-4, 0.003, 0.001, 0.1, 0.01, 0.003, 0.001), 0.3 / 784),
        (60, 19_600),
    ),
    "kpsvd-published-faces": Race(
        "faces-surrogate-autoencoder-koroko",
        625,
        1024,
        _koroko(
            (0.1, 0.001, 0.1, 0.001, 0.003, 0.001, 0.1, 0.03, 0.003, 0.001), 0.3 / 312.5
        ),
        (10, 16_200),
    ),
    "mbf-training-curves": _goldfarb(
        "curves-surrogate-autoencoder",
        {"mbf": (1e-5, 3e-4), "kfac": (1e-2, 1.0), "shampoo": (1e-3, 3e-3)},
        (3e-4, 1e-4),
        1e-2,
        (100, 5_000),
    ),
    "mbf-training-mnist": _goldfarb(
        "mnist-autoencoder",
        {"mbf": (1e-5, 3e-4), "kfac": (3e-3, 0.3), "shampoo": (3e-4, 3e-4)},
        (3e-4, 1e-4),
        3e-3,
        (30, 10_000),
    ),
    "mbf-training-faces": _goldfarb(
        "faces-surrogate-autoencoder",
        {"mbf": (1e-6, 3e-3), "kfac": (0.1, 10.0), "shampoo": (3e-4, 3e-4)},
        (1e-4, 1e-4),
        1e-3,
        (6, 10_000),
    ),
    "mbf-variants": Race(
        "digits-autoencoder", 1, 250, VARIANTS, (45, 1_000), default_weights=True
    ),
    "mbf-training-cnn": Race(
        "cifar10-subset-resnet8",
        1,
        128,
        _convolutional(1e-4, 3.0),
        (24, 78_200),
        looks=3,
        others={
            "cifar10-resnet32": {},
            "cifar100-vgg16": {
                "runners": _convolutional(3e-5, 10.0),
                "steps": (24, 78_200),
                "falls": _falls(50, 60),
            },
            "svhn-vgg11": {
                "runners": _convolutional(1e-3, 0.3),
                "steps": (24, 57_200),
                "falls": _falls(50, 60),
            },
        },
        falls=_falls(60, 80),
    ),
    "cg-fac-training": Race(
        "digits-autoencoder",
        1,
        250,
        {
            name: {"lr": 1e-2, "damping": 0.1, "clip": None, **_EVERY_STEP}
            for name in ("kfac-eigen", "cg-fac")
        },
        (60, 1_000),
    ),
    "kfac-batches": Race(
        "curves-surrogate-autoencoder-martens", 1, 1000, BATCHES, (15, 1_000)
    ),
    "kfac-training-curves": Race(
        "curves-surrogate-autoencoder-martens",
        1,
        ExponentialBatches(1000, 20_000),
        {**ADAPTIVE, NO_MOMENTUM: {"damping": START, "momentum": False}},
        (40, 1_000),
        others={"digits-autoencoder-martens": {}},
    ),
    "kfac-training-mnist": Race(
        "mnist-autoencoder-martens",
        1,
        ExponentialBatches(1000, 60_000),
        ADAPTIVE,
        (10, 1_000),
    ),
    "kfac-training-faces": Race(
        "faces-surrogate-autoencoder-martens",
        1,
        ExponentialBatches(1000, 103_500),
        ADAPTIVE,
        (4, 1_000),
    ),
}
