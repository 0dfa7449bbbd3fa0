"""What a table says in words: who serves a purpose best, at what cost, and who cannot.

Numbers in, sentences out. Approximations are set against one another only where all of
them have a number; who is left out of a contest is named, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from fisherlab.analysis.damping_ranges import damping_verdict
from fisherlab.analysis.merging import judged
from fisherlab.analysis.wording import percent, quoted
from fisherlab.catalogue import total_share
from fisherlab.showing import kind_of

Grid = NDArray[Any]
TIED: Final = 1e-6  # distances from the best that differ by less are called equal
NAMED: Final = 3  # layers that a sentence names
HELD: Final = "it holds {} the numbers of the exact blocks"
SOLVE: Final = "a solve takes {} the flops of theirs"
SIZE: Final = "left out for size"
OF_ALL: Final = " of the parameters"
UNHELD: Final = " (leads are not held against noise)"
_NEEDED: Final = re.compile(r"λ above ([-+.0-9e]+) needed")


@dataclass(frozen=True, eq=False)
class Contest:
    """One measure of every approximation, layer by layer and for all layers together.

    Parameters
    ----------
    title
        What is measured.
    best
        What the exact block has; the nearest to it wins.
    layers, methods
        The rows, and the columns without the exact block.
    sizes
        Parameters of every layer.
    values, status
        Numbers (layers, methods), and what is said of each cell, "ok" where nothing is.
    pooled
        All layers together (methods), NaN where one is missing; None where layers cannot
        be put together.
    costs
        `HELD` and `SOLVE` to the amounts of the methods (layers, methods) and of the exact
        block (layers).
    noise
        How far the exact block's own number is from that of unlimited data; NaN unknown,
        and then the sentence says that leads are not held against it.
    known
        What theory says beforehand, by method.
    setting
        At which λ and the like.

    Examples
    --------
    >>> values, ok = np.array([[0.4, 0.8]]), np.array([["ok", "ok"]])
    >>> one = Contest(
    ...     "error", 0.0, ("0",), ("kfac", "diagonal"), np.ones(1), values, ok, values[0]
    ... )
    >>> one.told().partition(" (")[0]
    '`kfac` is the closest to the exact block, error 0.4, then `diagonal` with 0.8'
    """

    title: str
    best: float
    layers: tuple[str, ...]
    methods: tuple[str, ...]
    sizes: Grid
    values: Grid
    status: Grid
    pooled: Grid | None = None
    costs: Mapping[str, tuple[Grid, Grid]] = field(default_factory=dict)
    noise: float = float("nan")
    known: Mapping[str, str] = field(default_factory=dict)
    setting: str = ""

    @property
    def complete(self) -> tuple[str, ...]:
        """Approximations with a number for all layers together, the best first."""
        found = [name for name in self.methods if np.isfinite(self.of(name))]
        return tuple(sorted(found, key=lambda name: abs(self.of(name) - self.best)))

    @property
    def indefinite(self) -> dict[str, list[int]]:
        """Layers, by approximation, where it is not positive definite."""
        return self._where(lambda i, j: self._needed(i, j) is not None)

    @property
    def partial(self) -> dict[str, list[int]]:
        """Layers, by approximation, without a number that no indefiniteness explains."""
        whole = np.isfinite([self.of(name) for name in self.methods])
        missing = ~(np.isfinite(self.values) | whole)
        return self._where(lambda i, j: missing[i, j] and self._needed(i, j) is None)

    def _needed(self, row: int, column: int) -> re.Match[str] | None:
        """Return which λ a cell says that it needs, if it is indefinite."""
        return _NEEDED.search(str(self.status[row, column]))

    def _where(self, holds: Callable[[int, int], Any]) -> dict[str, list[int]]:
        rows = range(len(self.layers))
        found = {n: [i for i in rows if holds(i, j)] for j, n in enumerate(self.methods)}
        return {name: there for name, there in found.items() if there}

    def winners(self) -> dict[str, tuple[str, ...]]:
        """Name the nearest of every layer where at least two have a number; ties share."""
        found = {}
        for layer, row in zip(self.layers, self.values, strict=True):
            gaps = np.abs(row - self.best)
            if np.isfinite(gaps).sum() > 1:
                first = np.flatnonzero(gaps <= np.nanmin(gaps) + TIED)
                found[layer] = tuple(self.methods[j] for j in first)
        return found

    def told(self) -> str:
        """Say who is nearest to the exact block, at what cost, and who cannot be had."""
        parts = [*self._first(), *self._unusable(), *self._absent()]
        parts += [f"judged at {self.setting}"] if self.setting else []
        return " ".join(f"{part[0].upper()}{part[1:].rstrip('.')}." for part in parts)

    def _first(self) -> list[str]:
        complete = self.complete
        if len(self.methods) == 1 and complete:
            return [f"`{complete[0]}`: {self.title} {self._number(complete[0])}"]
        if complete and not self.partial:
            return [self._ranked(complete), *self._cost(complete[0])]
        told = self._layers_won() or "no approximation has a number in every layer"
        if not np.isfinite(self.values).any():
            told = f"{self.title}: there are no numbers"
        whole = [f"`{name}` ({self._number(name)})" for name in complete]
        alone = [f"a number in every layer has only {', '.join(whole)}"] if whole else []
        return [told, *alone]

    def of(self, method: str) -> float:
        """Return the number of all layers together."""
        if self.pooled is None or method not in self.methods:
            return float("nan")
        return float(self.pooled[self.methods.index(method)])

    def _number(self, method: str) -> str:
        return f"{self.of(method):.3g}"

    def _ranked(self, complete: Sequence[str]) -> str:
        """Say who is nearest for all layers together, who is next, and if that is noise."""
        gaps = [abs(self.of(name) - self.best) for name in complete]
        tied = [n for n, gap in zip(complete, gaps, strict=True) if gap <= gaps[0] + TIED]
        verb = "are" if len(tied) > 1 else "is"
        among = " of those that can be used" * (len(complete) < len(self.methods))
        said = f"{quoted(tied)} {verb} the closest to the exact block{among}, "
        said += f"{self.title} {self._number(tied[0])}"
        if len(tied) < len(complete):
            rival, lead = complete[len(tied)], gaps[len(tied)] - gaps[0]
            said += f", then `{rival}` with {self._number(rival)}"
            if lead <= self.noise:
                said += f" (a lead within the noise of the data, {self.noise:.2g})"
            elif np.isnan(self.noise):
                said += UNHELD
        return said + self._settled(tied)

    def _settled(self, winners: Sequence[str]) -> str:
        """Say what theory says beforehand of the first winner that it knows."""
        return next((f"; {self.known[name]}" for name in winners if name in self.known), "")

    def _layers_won(self) -> str:
        """Say who is nearest in how many layers, of those that have numbers there."""
        won: dict[str, list[str]] = {}
        winners = self.winners()
        for layer, names in winners.items():
            for name in names:
                won.setdefault(name, []).append(layer)
        if not won:
            return ""
        order = sorted(won, key=lambda name: (-len(won[name]), self.methods.index(name)))
        told = [
            f"`{name}` in {len(won[name])}{f' of {len(winners)} layers' * (not n)} "
            f"({self._share(won[name])})"
            for n, name in enumerate(order)
        ]
        return (
            f"layer by layer, of those that have a number there, the closest to the exact "
            f"block ({self.title}) is {', '.join(told)}{UNHELD * (len(won) > 1)}"
            f"{self._settled(order)}"
        )

    def _cost(self, method: str) -> list[str]:
        """Say what an approximation costs beside the exact block."""
        column, told = self.methods.index(method), []
        for what, (own, exact) in self.costs.items():
            share = total_share(own[:, column], exact)
            if np.isfinite(share):
                amount = f"{percent(share)} of" if share < 2 else f"{share:.3g} times"
                dear = ", dearer than the exact solve" * (what == SOLVE and share > 1)
                told.append(f"{what.format(amount)}{dear}")
        return ["; ".join(told)] if told else []

    def _unusable(self) -> list[str]:
        """Say where approximations are indefinite, and from which λ on they are not."""
        told = []
        for name, rows in self.indefinite.items():
            column = self.methods.index(name)
            needed = (self._needed(i, column) for i in rows)
            least = max(float(found[1]) for found in needed if found)
            there = f"`{name}` is indefinite in {self._at(rows)}"
            told.append(f"{there}; from λ = {least:.3g} on it is not")
        return told

    def _absent(self) -> list[str]:
        """Say where numbers lack for other reasons: a clause a reason."""
        groups: dict[str, dict[tuple[int, ...], list[str]]] = {}
        for name, rows in self.partial.items():
            cells = [coarse(str(c)) for c in self.status[rows, self.methods.index(name)]]
            for why in dict.fromkeys(cells):
                at = tuple(i for i, cell in zip(rows, cells, strict=True) if cell == why)
                groups.setdefault(why, {}).setdefault(at, []).append(name)
        return [f"{self._lacking(parts)}: {why}" for why, parts in groups.items()]

    def _lacking(self, parts: Mapping[tuple[int, ...], Sequence[str]]) -> str:
        if len(parts) == 1:
            ((rows, names),) = parts.items()
            verb = "have" if len(names) > 1 else "has"
            return f"{quoted(names)} {verb} no number in {self._at(rows)}"
        told = [f"{quoted(names)} in {self._at(rows)}" for rows, names in parts.items()]
        listed = ", ".join(told).replace(OF_ALL, "")
        return f"without a number (share{OF_ALL}): {listed}"

    def _at(self, rows: Sequence[int]) -> str:
        names = [self.layers[i] for i in rows]
        some = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        return f"{some} ({self._share(names)}{OF_ALL})"

    def _share(self, layers: Sequence[str]) -> str:
        rows = [self.layers.index(name) for name in layers]
        return percent(float(self.sizes[rows].sum() / self.sizes.sum()))


def coarse(why: str) -> str:
    """Leave the counts out of what is left out for size, so that layers share a line.

    Examples
    --------
    >>> coarse("left out for size: damped inverses (3e13 multiply-adds); ask with --time")
    'left out for size: damped inverses; ask with --time'
    """
    parts = why.split("; ")
    return "; ".join(
        re.sub(r" \(.*\)", "", part) if part.startswith(SIZE) else part for part in parts
    )


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
    >>> verdict(found)[0].split(",")[0]
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
