"""Synthetic results that follow the schema of `fl.compare`, for tests of the views."""

import json

import numpy as np
import xarray as xr

NAMES = (
    "exact",
    "kfac",
    "kpsvd",
    "kpsvd-2",
    "kfac-corrected",
    "mini-block",
    "diagonal",
)
LEVEL = {
    "exact": 0.0,
    "kfac": 0.46,
    "kpsvd": 0.40,
    "kpsvd-2": 0.28,
    "kfac-corrected": 0.33,
    "mini-block": 0.72,
    "diagonal": 0.94,
}
SHAPES = {
    "0": (20, 257),
    "2": (20, 21),
    "4": (20, 21),
    "6": (20, 21),
    "8": (20, 21),
    "10": (10, 21),
}


def comparison(
    layers=SHAPES,
    approximators=NAMES,
    dampings=(1e-3, 1e-2, 1e-1),
    steps=(0, 20, 200, 1000),
    seed=0,
):
    """Make a plausible result; None for `steps` or `dampings` drops the dim."""
    layers = dict(layers)
    coords = {
        "layer": list(layers),
        "approximator": list(approximators),
        "d_out": ("layer", [shape[0] for shape in layers.values()]),
        "d_in": ("layer", [shape[1] for shape in layers.values()]),
        "positions": ("layer", [1] * len(layers)),
        "step": list(steps or (0,)),
        "damping": list(dampings or (1e-2,)),
    }
    ds = xr.Dataset(_variables(layers, approximators, coords, seed), coords, _attrs())
    ds = ds if steps is not None else ds.isel(step=0, drop=True)
    return ds if dampings is not None else ds.isel(damping=0)


def _variables(layers, approximators, coords, seed):
    draw = np.random.default_rng(seed)
    s, l, a = (len(coords[c]) for c in ("step", "layer", "approximator"))
    level = np.array([LEVEL.get(name, 0.5) for name in approximators])
    growth = 0.55 + 0.45 * np.linspace(0, 1, s)[:, None, None]
    depth = 1 + 0.25 * draw.uniform(-1, 1, (s, l, 1))
    error = np.minimum(growth * depth * level, 0.98 * (level > 0))
    alpha = np.asarray(coords["damping"])
    shrink = 1 / (1 + 6 * alpha**0.5)
    cell, wide = ("step", "layer", "approximator"), ("damping",)
    mean = 10.0 ** draw.uniform(-6, -3, (s, l))
    return {
        "frobenius_error": (cell, error, {"long_name": "relative error", "units": "1"}),
        "cosine_similarity": (cell, np.sqrt(1 - error**2)),
        "trace_ratio": (cell, 1 - 0.1 * error),
        "direction_cosine": (
            (*cell, *wide),
            1 - 0.5 * error[..., None] ** 2 * shrink,
        ),
        "inverse_error": ((*cell, *wide), 1.4 * error[..., None] * shrink),
        "lambda": (("step", "layer", *wide), mean[..., None] * alpha),
        "mean_eigenvalue": (("step", "layer"), mean),
        "fisher_norm": (("step", "layer"), mean * 40),
        "stored_numbers": (cell[1:], _stored(layers, approximators)),
        "solve_flops": (cell[1:], _flops(layers, approximators)),
        "converged": (cell, np.full((s, l, a), -1, dtype=np.int8)),
        "status": (cell, np.full((s, l, a), "ok", dtype=object)),
        "train_loss": (("step",), 2.3 * np.exp(-np.linspace(0, 4, s))),
        "test_loss": (("step",), 2.3 * np.exp(-np.linspace(0, 3, s))),
        "train_accuracy": (("step",), np.linspace(0.1, 0.99, s)),
        "test_accuracy": (("step",), np.linspace(0.1, 0.95, s)),
    }


def _stored(layers, approximators):
    def count(name, o, i):
        pair = o * (o + 1) / 2 + i * (i + 1) / 2
        return {
            "exact": o * i * (o * i + 1) / 2,
            "kfac": pair,
            "kpsvd": pair,
            "mini-block": o * i * (i + 1) / 2,
            "diagonal": o * i,
        }.get(name, 2 * pair)

    return np.array([[count(n, *s) for n in approximators] for s in layers.values()])


def _flops(layers, approximators):
    def count(name, o, i):
        pair = 2 * o * i * (o + i)
        return {
            "exact": 2 * (o * i) ** 2,
            "kfac": pair,
            "kpsvd": pair,
            "mini-block": 2 * o * i * i,
            "diagonal": o * i,
        }.get(name, 4 * pair)

    return np.array(
        [[count(n, *s) for n in approximators] for s in layers.values()], dtype=float
    )


def _attrs():
    return {
        "creation_library": "fisherlab",
        "creation_library_version": "0.1.0",
        "created_at": "2026-01-01T00:00:00+00:00",
        "fisher": "Exact()",
        "likelihood": "Categorical()",
        "examples": 1797,
        "dtype": "float64",
        "device": "cpu",
        "seed": 0,
        "torch_version": "2.13.0",
        "damping_kind": "relative",
        "problem": "digits",
        "model": "256-20-20-20-20-20-10 tanh classifier, 7,030 parameters",
        "approximators": json.dumps({"kfac": "KFAC()", "kpsvd-2": "KPSVD(rank=2)"}),
        "conventions": "row-major vec, bias last column; F = (1/N) sum",
    }


def inverses(shapes=None, approximators=NAMES, damping=1e-2, seed=0):
    """Make a tree of damped inverses of random low-rank blocks and approximations."""
    shapes = shapes or {"2": (20, 21), "6": (20, 21), "10": (10, 21)}
    draw = np.random.default_rng(seed)
    nodes = {
        name: _inverse_node(draw, shape, approximators, damping)
        for name, shape in shapes.items()
    }
    tree = xr.DataTree.from_dict(nodes)
    tree.attrs = _attrs()
    return tree


def _inverse_node(draw, shape, approximators, damping):
    d_out, d_in = shape
    p = d_out * d_in
    scale = np.repeat(10.0 ** draw.uniform(-1.5, 0.3, d_out), d_in)
    scale = scale * np.tile(10.0 ** draw.uniform(-0.4, 0.2, d_in), d_out)
    mixing = draw.normal(size=(p, 3 * p // 4)) * scale[:, None]
    fisher = mixing @ mixing.T / p
    lam = damping * np.trace(fisher) / p
    stack = [np.linalg.inv(_like(n, fisher, d_in) + lam * np.eye(p)) for n in approximators]
    coords = {
        "approximator": list(approximators),
        "row": np.arange(p),
        "col": np.arange(p),
    }
    attrs = {"weight_shape": [d_out, d_in], "mini_block_size": d_in, "lambda": lam}
    variable = (("approximator", "row", "col"), np.stack(stack).astype(np.float32))
    return xr.Dataset({"inverse": variable}, coords, attrs)


def _like(name, fisher, d_in):
    if name == "diagonal":
        return np.diag(np.diag(fisher))
    rows = np.arange(len(fisher)) // d_in
    same = rows[:, None] == rows[None, :]
    if name == "mini-block":
        return np.where(same, fisher, 0.0)
    return fisher if name == "exact" else np.where(same, fisher, 0.6 * fisher)
