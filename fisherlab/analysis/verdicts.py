"""What a table says in words: who serves a purpose best, at what cost, and who cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from fisherlab.analysis.contests import HELD, SOLVE, Contest, Grid, LeadErrors
from fisherlab.analysis.damping_ranges import damping_verdict
from fisherlab.analysis.merging import judged
from fisherlab.showing import kind_of


def verdict(found: xr.Dataset) -> list[str]:
    """Say for every purpose which approximation serves it best, and which not at all.

    Ranked by the first measure of a purpose, for all layers together, by how far it is
    from what the exact block has; or layer by layer, where approximations have numbers
    in some layers only. Who is indefinite or left out is named, with the layers and the
    share of the parameters in them. Of a sweep: at which dampings the step of a method
    serves, and where it is worse than the gradient.

    Parameters
    ----------
    found
        What `compare` returned with `purpose=`, `sweep` with a gradient, or the result of
        a report.

    Returns
    -------
    list of str
        A line a purpose; of a sweep a line a method.

    Raises
    ------
    ValueError
        If the table holds neither.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> found = fl.compare(stats, ["kfac", "diagonal"], purpose=fl.Matrix())
    >>> verdict(found)[0].split(" by ")[0]
    'matrix: `kfac` is the closest to the exact block'
    """
    told = [f"{purpose}: {one.told()}" for purpose, one in contests(found).items()]
    told += damping_verdict(found)
    if not told:
        raise ValueError(
            "verdict: the table holds neither purposes nor steps at several dampings; "
            "compare(..., purpose=[...]) and sweep(..., gradient=...) make them."
        )
    return told


def contests(found: xr.Dataset) -> dict[str, Contest]:
    """Return the contest of every purpose, by its first measure; {} without purposes."""
    if "of_purpose" not in found.coords:
        return {}
    table = judged(found)
    return {str(p): _contest(table, str(p)) for p in table["purpose"].values}


def _contest(table: xr.Dataset, purpose: str) -> Contest:
    first = table.isel(measure=int(np.flatnonzero(table["of_purpose"] == purpose)[0]))
    first, made = first.sel(purpose=purpose), _made(table)
    every = [str(name) for name in table["approximator"].values]
    methods = [n for n in every if not str(made.get(n, n)).startswith("ExactBlock")]
    kept = first.sel(approximator=[n for n in methods if n != "exact"])
    names = tuple(map(str, kept["approximator"].values))
    cell, whom = ("layer", "approximator"), _word(first, "settles")
    return Contest(
        _word(first, "title"),
        float(first["best"]),
        titles(table),
        names,
        _sizes(table),
        kept["value"].transpose(*cell).values,
        kept["status"].transpose(*cell).values,
        kept["network"].values,
        costs(table, names),
        known=settled(table, _word(first, "assured"), whom.split(" | ") if whom else ()),
        setting=_word(first, "setting"),
        common=_common(kept),
        errors=_lead_errors(kept, names),
    )


def _common(first: xr.Dataset) -> tuple[Grid, Grid] | None:
    if "common" not in first:
        return None
    return first["common_layers"].values.astype(bool), first["common"].values


def _lead_errors(first: xr.Dataset, methods: Sequence[str]) -> LeadErrors | None:
    if "lead_error" not in first:
        return None
    known = first.reindex(rival=list(methods))  # results put together may lack some
    over = "approximator", "rival"
    return LeadErrors(
        known["lead_error"].transpose("layer", *over).values,
        known["network_lead_error"].transpose(*over).values,
        known["common_lead_error"].transpose(*over).values,
    )


def _word(found: xr.Dataset, name: str) -> str:
    return str(found[name].item()) if name in found else ""


def settled(table: xr.Dataset, assured: str, whom: Sequence[str]) -> dict[str, str]:
    """Return what is known beforehand, by each method whose `repr` begins like one of whom.

    Examples
    --------
    >>> table = xr.Dataset(attrs={"approximators": '{"diagonal": "Diagonal()"}'})
    >>> settled(table, "it is one", ["Diagonal("])
    {'diagonal': 'that it is one follows from the definition'}
    """
    said = f"that {assured} follows from the definition"
    return {
        n: said for n, made in _made(table).items() if str(made).startswith(tuple(whom))
    }


def titles(table: xr.Dataset) -> tuple[str, ...]:
    """Return the layers as sentences name them: of a number with its kind."""
    names = list(map(str, np.atleast_1d(table["layer"].values)))
    if "kind" not in table.coords:
        return tuple(names)
    kinds = np.atleast_1d(table["kind"].values)
    return tuple(n + kind_of(n, str(kind)) for n, kind in zip(names, kinds, strict=True))


def _sizes(table: xr.Dataset) -> Grid:
    if not {"d_out", "d_in"} <= set(table.coords):
        return np.ones(table.sizes["layer"])
    return np.asarray(table["d_out"].values * table["d_in"].values, dtype=float)


def costs(table: xr.Dataset, methods: Sequence[str]) -> dict[str, tuple[Grid, Grid]]:
    """Return what methods hold and what a solve with them takes, and the exact block."""
    found = {}
    p = _sizes(table)
    held = _amounts(table, "stored_numbers", methods)
    if held is not None and {"d_out", "d_in"} <= set(table.coords):
        found[HELD] = held, p * (p + 1) / 2
    solve = _amounts(table, "solve_flops", methods)
    if solve is not None and "exact_solve_flops" in table:
        found[SOLVE] = solve, np.asarray(table["exact_solve_flops"])
    elif solve is not None and "exact" in table["approximator"].values:
        exact = _amounts(table, "solve_flops", ["exact"])
        assert exact is not None, "the methods have it"
        found[SOLVE] = solve, exact[:, 0]
    return found


def _amounts(table: xr.Dataset, name: str, methods: Sequence[str]) -> Grid | None:
    if name not in table:
        return None
    amounts = table[name].sel(approximator=list(methods))
    amounts = amounts.isel({d: -1 for d in ("step", "seed") if d in amounts.dims})
    return np.asarray(amounts.transpose("layer", "approximator").values, dtype=float)


def _made(table: xr.Dataset) -> dict[str, Any]:
    """Return the values that methods were made by, where the result tells."""
    try:
        told = json.loads(str(table.attrs.get("approximators", "{}")))
    except json.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}
