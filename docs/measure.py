"""Measure every method on three small networks, for the pages of the methods.

`python docs/measure.py` writes `docs/measured.json`: relative errors of all layers
together, √(Σ‖F − F̂‖² / Σ‖F‖²), over the layers that have inputs and output gradients.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fisherlab as fl
from fisherlab.catalogue import overall

EXAMPLES, STEPS = 100, 50
FILE = Path(__file__).with_name("measured.json")


def convolutional() -> fl.problems.Problem:
    """Return a small convolutional network on the digits."""
    digits = fl.problems.load("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 6, 5, stride=2), nn.Tanh()),
            *(nn.Conv2d(6, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 10)),
        ).double()
    likelihood = fl.Categorical()
    return fl.problems.Problem("digits-cnn", model, likelihood, digits.train, digits.test)


def networks() -> dict[str, tuple[fl.problems.Problem, str]]:
    """Return the three networks, and what each is in words."""
    words = {
        "fully connected": "256-20-20-20-20-20-10, tanh, SGD with momentum",
        "convolutional": "convolutions of 6 and 8 maps, 128-10, tanh, SGD with momentum",
        "transformer": "ViT of width 32, 2 blocks, 16 patches, Adam",
    }
    made = (
        fl.problems.load("digits", dtype=torch.float64),
        convolutional(),
        fl.problems.load("digits-vit", dtype=torch.float64),
    )
    return {name: (one, words[name]) for name, one in zip(words, made, strict=True)}


def measured(problem: fl.problems.Problem, optimiser: str) -> dict[str, float]:
    """Return the error of every method after some training."""
    fl.follow(problem, optimiser, steps=STEPS, every=STEPS, probes=[])
    x, y = problem.train
    data = x[:EXAMPLES], y[:EXAMPLES]
    with fl.frozen(problem.model) as model:
        stats = fl.collect(model, data, problem.likelihood)
        found = fl.compare(stats, list(fl.approximators()), metrics=["frobenius_error"])
    kept = np.isfinite(found.frobenius_error.sel(approximator="kfac", drop=True))
    norms = found.fisher_norm.where(kept, drop=True)
    errors = found.frobenius_error.where(kept, drop=True)
    return {
        name: round(overall(errors.sel(approximator=name).values, norms.values), 4)
        for name in map(str, found.approximator.values)
    }


def main() -> None:
    """Measure and write."""
    result = {
        "measured_at": f"{datetime.now(UTC):%Y-%m-%d}",
        "torch": torch.__version__,
        "examples": EXAMPLES,
        "steps": STEPS,
        "networks": {},
        "errors": {},
    }
    for name, (problem, words) in networks().items():
        result["networks"][name] = words
        result["errors"][name] = measured(
            problem, "adam" if "Adam" in words else "sgd-momentum"
        )
        print(name, result["errors"][name])
    FILE.write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
