"""Approximations set against one another in one measure, and what is said of it.

Numbers in, sentences out. Approximations are set against one another only where all of
them have a number; who is left out of a contest is named, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fisherlab.catalogue import total_share
from fisherlab.showing import percent, quoted, two_digits

Grid = NDArray[Any]
TIED: Final = 1e-6  # distances from the best that differ by less are called equal
NAMED: Final = 3  # layers that a sentence names
EQUALS: Final = 5  # methods that are equally close, of which all are named
MOST: Final = 0.9  # of the parameters, in layers where methods are held together
HELD: Final = "`{}` holds {} the numbers of the exact blocks"
SOLVE: Final = "a solve with `{}` takes {} the flops of theirs"
SIZE: Final = "left out for size"
OF_ALL: Final = " of the parameters"
DOUBT: Final = 2  # standard errors within which a lead is one by chance
_NEEDED: Final = re.compile(r"λ above ([-+.0-9e]+) needed")


@dataclass(frozen=True, eq=False)
class LeadErrors:
    """Standard errors of leads over other examples, NaN where they are not known.

    Parameters
    ----------
    layers
        Of every layer (layers, methods, methods).
    pooled, common
        Of all layers together, and of those in common (methods, methods).

    Examples
    --------
    >>> LeadErrors(*(np.zeros(shape) for shape in ((1, 2, 2), (2, 2), (2, 2)))).pooled[0, 1]
    np.float64(0.0)
    """

    layers: Grid
    pooled: Grid
    common: Grid


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
    common
        Layers, nearly all of the network, where several methods have numbers, and those
        of these layers together (methods), see `in_common`; None where it is not known.
    errors
        Standard errors of leads over other examples; None where nothing is known of them.
    sampled
        What the errors are over, if not examples.
    unheld
        Why leads have no errors, if they cannot have any.

    Examples
    --------
    >>> values, ok = np.array([[0.4, 0.8]]), np.array([["ok", "ok"]])
    >>> one = Contest(
    ...     "error", 0.0, ("0",), ("kfac", "diagonal"), np.ones(1), values, ok, values[0]
    ... )
    >>> one.told().partition(" (")[0]
    '`kfac` is the closest to the exact block by error: 0.4, then `diagonal` with 0.8'
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
    common: tuple[Grid, Grid] | None = None
    errors: LeadErrors | None = None
    sampled: str = "examples"
    unheld: str = ""

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
        return " ".join(filter(None, (self.headline(), self.details())))

    def headline(self) -> str:
        """Say who is nearest to the exact block, at what cost, and who is indefinite."""
        return _sentences([*self._first()[:1], *self._unusable()])

    def details(self) -> str:
        """Say the rest: layers, what is missing, and at which λ all that is so."""
        parts = [*self._first()[1:], *self._absent()]
        return _sentences(parts + [f"judged at {self.setting}"] * bool(self.setting))

    def missing(self) -> str:
        """Say in a few words where there are no numbers, and why; "" where all are."""
        groups: dict[str, dict[str, list[int]]] = {}
        for i, j in np.argwhere(~np.isfinite(self.values)).tolist():
            why = "indefinite" if self._needed(i, j) else _briefly(self.status[i, j])
            groups.setdefault(why, {}).setdefault(self.methods[j], []).append(i)
        told = []
        for why, at in groups.items():
            cells = [f"`{name}` in {self._at(rows)}" for name, rows in at.items()]
            told.append(f"{', '.join(cells)}: {why}")
        return f"Without a mark: {'; '.join(told)}.".replace(OF_ALL, "") if told else ""

    def knowing(self, other: Contest) -> Contest:
        """Return the same, with those that the other knows to be indefinite."""
        status = self.status.copy()
        for i, j in np.argwhere(np.isfinite(self.values)).tolist():
            layer, name = self.layers[i], self.methods[j]
            if layer in other.layers and name in other.methods and not self._needed(i, j):
                place = other.layers.index(layer), other.methods.index(name)
                if other._needed(*place):
                    status[i, j] = other.status[place]
        return replace(self, status=status)

    def _first(self) -> list[str]:
        """Say who is nearest, and then more about it."""
        complete = self.complete
        if len(self.methods) == 1 and complete:
            return [f"`{complete[0]}`: {self.title} {self._number(complete[0])}"]
        if complete and not self.partial:
            among = " of those that can be used" * (len(complete) < len(self.methods))
            errors = None if self.errors is None else self.errors.pooled
            ranked = self._ranked(complete, self.of, among, errors)
            return [ranked + self._cost(complete[0])]
        together, layers = self._together(), self._layers_won()
        whole = [f"`{name}` ({self._number(name)})" for name in complete]
        alone = [f"a number in every layer has only {', '.join(whole)}"] if whole else []
        if together:
            said = self._everywhere() and len(whole) <= 2  # both are in the sentence
            return [*together, layers, *([] if said else alone)]
        if not np.isfinite(self.values).any():
            return [f"{self.title}: there are no numbers"]
        if not layers:
            return ["no approximation has a number in every layer", *alone]
        return [layers + self._settled(self._order()), *alone]

    def of(self, method: str) -> float:
        """Return the number of all layers together."""
        if self.pooled is None or method not in self.methods:
            return float("nan")
        return float(self.pooled[self.methods.index(method)])

    def _number(self, method: str) -> str:
        return f"{self.of(method):.3g}"

    def _ranked(
        self,
        methods: Sequence[str],
        of: Callable[[str], float],
        among: str,
        errors: Grid | None,
    ) -> str:
        """Say who is nearest for layers together, who is next, and if that is noise."""
        gaps = [abs(of(name) - self.best) for name in methods]
        tied = [n for n, gap in zip(methods, gaps, strict=True) if gap <= gaps[0] + TIED]
        verb = "are" if len(tied) > 1 else "is"
        named = tied if len(tied) <= EQUALS else tied[:NAMED]
        more = f" and {len(tied) - NAMED} more" * (named != tied)
        said = f"{quoted(named)}{more} {verb} the closest to the exact block{among}"
        said += f"{',' if among else ''} by {self.title}:"
        if len(tied) == len(methods):
            said += f" {of(tied[0]):.3g}"
        else:
            rival, lead = methods[len(tied)], gaps[len(tied)] - gaps[0]
            first, second = _told_apart(of(tied[0]), of(rival))
            said += f" {first}, then `{rival}` with {second}"
            said += self._doubt(lead, self._error(errors, tied[0], rival))
        return said + self._settled(named)

    def _error(self, errors: Grid | None, first: str, second: str) -> float:
        """Return the standard error of the lead of a method over another."""
        if errors is None:
            return float("nan")
        return float(errors[self.methods.index(first), self.methods.index(second)])

    def _doubt(self, lead: float, error: float) -> str:
        """Say how a lead stands beside what other data would have moved it by."""
        if np.isfinite(error):
            within = f", within the noise of the {self.sampled}" * (lead <= DOUBT * error)
            return f" (a lead of {two_digits(lead)} ± {two_digits(DOUBT * error)}{within})"
        if lead <= self.noise:
            return f" (a lead within the noise of the data, {self.noise:.2g})"
        return self._undecided() * bool(np.isnan(self.noise))

    def _undecided(self) -> str:
        """Say that nothing is known of noise, and why if nothing can be."""
        why = f": {self.unheld}" * bool(self.unheld)
        return f" (leads are not held against noise{why})"

    def _together(self) -> list[str]:
        """Rank those that have numbers in nearly all of the network over these layers."""
        if self.common is None:
            return []
        rows, numbers = self.common
        known = dict(zip(self.methods, map(float, numbers), strict=True))
        ranked = [name for name, value in known.items() if np.isfinite(value)]
        ranked.sort(key=lambda name: abs(known[name] - self.best))
        if len(ranked) < 2:
            return []
        if self._everywhere():
            among = " of those with a number in every layer"
            errors = None if self.errors is None else self.errors.pooled
            told = self._ranked(ranked, self.of, among, errors)
            return [told + self._cost(ranked[0])]
        at = [name for name, there in zip(self.layers, rows, strict=True) if there]
        errors = None if self.errors is None else self.errors.common
        among = " of those with a number there"
        said = self._ranked(ranked, known.__getitem__, among, errors)
        where = f"over {len(at)} of {len(self.layers)} layers ({self._share(at)}{OF_ALL})"
        return [f"{where} {said}{self._cost(ranked[0])}"]

    def _everywhere(self) -> bool:
        """Whether methods are held together over all layers."""
        return self.common is not None and bool(self.common[0].all())

    def _settled(self, winners: Sequence[str]) -> str:
        """Say what theory says beforehand of the first winner that it knows."""
        return next((f"; {self.known[name]}" for name in winners if name in self.known), "")

    def _won(self) -> dict[str, list[str]]:
        """Return the layers in which a method is nearest, by method."""
        won: dict[str, list[str]] = {}
        for layer, names in self.winners().items():
            for name in names:
                won.setdefault(name, []).append(layer)
        return won

    def _order(self) -> list[str]:
        """Return who is nearest in a layer, first who is so in most."""
        won = self._won()
        return sorted(won, key=lambda name: (-len(won[name]), self.methods.index(name)))

    def _layers_won(self) -> str:
        """Say who is nearest in how many layers, of those that have numbers there."""
        won, count = self._won(), len(self.winners())
        told = [
            f"`{name}` in {len(won[name])}{f' of {count} layers' * (not n)} "
            f"({self._share(won[name])})"
            for n, name in enumerate(self._order())
        ]
        if not told:
            return ""
        return (
            "layer by layer, of those that have a number there, the closest to the exact "
            f"block ({self.title}) is {', '.join(told)}{self._doubts() * (len(won) > 1)}"
        )

    def _doubts(self) -> str:
        """Say in how many layers the lead is within the noise."""
        if self.errors is None:
            return self._undecided()
        ratios = [
            self._over_error(row, errors)
            for row, errors in zip(self.values, self.errors.layers, strict=True)
            if np.isfinite(row).sum() > 1
        ]
        if np.isnan(ratios).any():
            return self._undecided()
        count = sum(ratio <= DOUBT for ratio in ratios)
        return f" (a lead within the noise of the {self.sampled} in {count})"

    def _over_error(self, values: Grid, errors: Grid) -> float:
        """Return the lead of the nearest in a layer over its standard error.

        Of equals, at either place, the pair counts of which least is certain.
        """
        gaps = np.abs(values - self.best)
        nearest = gaps <= np.nanmin(gaps) + TIED
        behind = np.where(nearest, np.nan, gaps)
        if np.isnan(behind).all():
            return float("inf")  # all are equal: nobody leads
        lead = np.nanmin(behind)
        error = errors[np.ix_(nearest, behind <= lead + TIED)].max()
        return float((lead - np.nanmin(gaps)) / error) if error else float("inf")

    def _cost(self, method: str) -> str:
        """Say what an approximation costs beside the exact block."""
        column, told = self.methods.index(method), ""
        for what, (own, exact) in self.costs.items():
            share = total_share(own[:, column], exact)
            if np.isfinite(share):
                amount = f"{percent(share)} of" if share < 2 else f"{share:.3g} times"
                dear = ", dearer than the exact solve" * (what == SOLVE and share > 1)
                told += f"; {what.format(method, amount)}{dear}"
        return told

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


def in_common(sizes: Grid, known: Grid) -> Grid:
    """Return the rows where methods that nearly cover a network can be held together.

    The method that covers most parameters comes first; every further one is taken where
    its rows and those so far still share nine tenths of the parameters.

    Parameters
    ----------
    sizes
        Parameters by row.
    known
        Which method (column) has a number in which row.

    Examples
    --------
    >>> known = np.array([[True, True, False], [True, True, True], [False, True, True]])
    >>> in_common(np.array([8, 88, 4]), known).tolist()
    [True, True, False]
    """
    covered = sizes @ known
    rows = np.ones(len(sizes), dtype=bool)
    for column in np.argsort(-covered, kind="stable"):
        shared = rows & known[:, column]
        if sizes[shared].sum() >= MOST * sizes.sum():
            rows = shared
    return rows


def _told_apart(first: float, second: float) -> tuple[str, str]:
    """Write two different numbers with three digits, or as many as tell them apart."""
    for digits in range(3, 18):
        told = f"{first:.{digits}g}", f"{second:.{digits}g}"
        if told[0] != told[1]:
            break
    return told


def _sentences(parts: Sequence[str]) -> str:
    return " ".join(f"{part[0].upper()}{part[1:].rstrip('.')}." for part in parts)


def _briefly(why: str) -> str:
    """Say of what was left out for size only that."""
    return SIZE if SIZE in str(why) else coarse(str(why))


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
