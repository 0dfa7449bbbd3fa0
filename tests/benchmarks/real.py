"""Comparisons straight from networks of the size people have, a process for each.

`python -m tests.benchmarks real`, or `python -m tests.benchmarks.real mlp` for one:
seconds, peak bytes above the start, and the bytes that were foretold, within `BUDGET`.
Weights and data are random.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.problems.networks import gpt, vit
from fisherlab.problems.networks import resnet18 as resnet18_model
from tests.benchmarks.memory import peak_above_base

BUDGET = 6 * 2**30
METHODS = ["kfac", "ekfac", "tkfac", "kpsvd", "mini-block"]
METRICS = ["frobenius_error", "direction_cosine"]


def _labelled(x: Tensor, classes: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return x, torch.randint(0, classes, (len(x), *shape), generator=generator)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mlp() -> tuple[nn.Module, Any]:
    """4096-4096-4096-1000 on 64 examples."""
    widths = (4096, 4096, 4096, 1000)
    layers = [piece for a, b in pairwise(widths) for piece in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), _labelled(_noise(64, 4096), 1000)


def resnet18() -> tuple[nn.Module, Any]:
    """Residual blocks of 64 to 512 channels on 128 images of 32 × 32."""
    return resnet18_model(dtype=torch.float32), _labelled(_noise(128, 3, 32, 32), 10)


def vit_tiny() -> tuple[nn.Module, Any]:
    """Width 192, depth 12, on 64 images of 32 × 32."""
    model = vit(channels=3, size=32, width=192, heads=3, depth=12, dtype=torch.float32)
    return model, _labelled(_noise(64, 3, 32, 32), 10)


def gpt2_small() -> tuple[nn.Module, Any]:
    """Width 768, depth 12, 50,257 tokens, on 16 sequences of 64."""
    model = gpt(
        vocabulary=50257,
        context=64,
        width=768,
        heads=12,
        depth=12,
        tied=True,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 50257, (16, 64), generator=generator)
    return model, _labelled(x, 50257, 64)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "vit-tiny": vit_tiny,
    "gpt2-small": gpt2_small,
}


def child(name: str) -> None:
    """Compare one network and print what it took as a line of JSON."""
    model, data = NETWORKS[name]()
    weights = [
        block
        for block, found in fl.blocks(model).items()
        if min(found.weight_shape) > 2 and not block.endswith(("embed", "position"))
    ]
    found: dict[str, Any] = {}

    def work() -> None:
        found["ds"] = fl.compare(
            model,
            data,
            fl.Categorical(),
            METHODS,
            fisher=fl.MonteCarlo(1),
            layers=weights,
            damping=fl.RelativeDamping(1.0),
            metrics=METRICS,
            budget=BUDGET,
            progress=lambda done: print(*done, file=sys.stderr, flush=True),
        )

    start = time.perf_counter()
    peak = peak_above_base(work)
    ds = found["ds"]
    row = {
        "seconds": time.perf_counter() - start,
        "peak": peak,
        "foretold": ds.attrs["foretold_bytes"],
        "layers": ds.sizes["layer"],
        "cells": int(ds.status.size),
        "served": int((ds.status == "ok").sum()),
    }
    print(json.dumps(row))


def table(rounds: int) -> dict[str, object]:
    """Run every network once in a process of its own."""
    rows = {}
    for name in NETWORKS:
        command = [sys.executable, "-m", "tests.benchmarks.real", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        last = done.stdout.splitlines()[-1:] if done.returncode == 0 else []
        rows[name] = json.loads(last[0]) if last else {"failed": done.returncode}
    notes = [f"{name}: {json.dumps(row)}" for name, row in rows.items()]
    return {
        "case": "real networks, layer by layer",
        "note": "\n  ".join(notes),
        "seconds": {n: round(r["seconds"], 1) for n, r in rows.items() if "seconds" in r},
        "times_ours": {},
        "rows": rows,
        "targets": {
            f"{n} bytes": {
                "measured": round(r["peak"] / BUDGET, 3),
                "aim": 1.1,
                "met": r["peak"] <= 1.1 * BUDGET,
            }
            for n, r in rows.items()
            if "peak" in r
        },
    }


TABLES = {"real": table}

if __name__ == "__main__":
    child(sys.argv[1])
