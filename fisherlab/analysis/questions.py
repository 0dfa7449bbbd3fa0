"""What a comparison asks: which metrics, at which dampings, along which gradient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisherlab.analysis.cells import REFUSALS
from fisherlab.analysis.damping import Dampings
from fisherlab.catalogue import quantity
from fisherlab.metrics.pairs import Pair
from fisherlab.metrics.register import Entry, entries
from fisherlab.statistics import MeanGradient, Statistics

Metrics = Sequence[str | Callable[..., Any]] | Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of every cell."""

    metrics: tuple[Entry, ...]
    dampings: Dampings
    gradient: Mapping[str, Tensor]
    mixed: bool

    def of(self, *needs: str) -> tuple[Entry, ...]:
        """Return the metrics that need one of some things, in order."""
        return tuple(entry for entry in self.metrics if entry.needs in needs)


def question(
    wanted: Metrics | None,
    levels: Dampings,
    gradient: Mapping[str, Any] | None,
    stats: Statistics,
    mixed: bool,
    k: int = 10,
    joined: Mapping[str, Tensor] | None = None,
) -> Question:
    """Check what is asked and make it complete.

    `joined` are gradients that are checked already, in place of those of the layers.

    Raises
    ------
    ValueError
        For unknown metrics, metrics without what they need, or unfit gradients.
    """
    directions = mean_gradients(gradient, stats) if joined is None else joined
    chosen = _metrics(wanted, levels, directions, entries(k))
    return Question(chosen, levels, directions, mixed)


def _metrics(
    wanted: Metrics | None,
    levels: Dampings,
    gradient: Mapping[str, Tensor],
    known: Mapping[str, Entry],
) -> tuple[Entry, ...]:
    given = {"matrix": True, "damping": bool(levels.labels)}
    given["gradient"] = given["damping"] and bool(gradient)
    if wanted is None:
        return tuple(e for e in known.values() if e.facts.default and given[e.needs])
    named = _named(wanted)
    known = {**known, **{name: _own(name, f) for name, f in named.items() if f}}
    names = list(named)
    unknown = [name for name in names if name not in known]
    if unknown:
        msg = f"compare: metrics {unknown} are unknown; known: {', '.join(known)}."
        raise ValueError(msg)
    lacking = [name for name in names if not given[known[name].needs]]
    if lacking:
        along = any(known[name].needs == "gradient" for name in lacking)
        msg = (
            f"compare: {', '.join(lacking)} needs `damping`"
            f"{' and `gradient`' if along else ''}."
        )
        raise ValueError(msg)
    return tuple(known[name] for name in names)


def _named(wanted: Metrics) -> dict[str, Callable[..., Any] | None]:
    """Return names in order, with the functions of one's own among them."""
    if isinstance(wanted, Mapping):
        return dict(wanted)
    return {
        one if isinstance(one, str) else one.__name__: None if isinstance(one, str) else one
        for one in wanted
    }


def _own(name: str, metric: Callable[..., Any]) -> Entry:
    """Return the entry of a function of F and F̂; its errors are refusals."""

    def value(pair: Pair) -> float:
        try:
            return float(metric(pair.exact, pair.approx))
        except REFUSALS:
            raise
        except Exception as error:
            msg = f"{name}: {type(error).__name__}: {error}"
            raise ValueError(msg) from error

    return Entry(quantity(name), value)


def mean_gradients(
    gradient: Mapping[str, Any] | None, stats: Statistics
) -> dict[str, Tensor]:
    """Return the gradient of every layer as w (d_out, d_in).

    Raises
    ------
    ValueError
        If a layer is missing or a gradient has another shape than its weight.
    """
    if gradient is None:
        return {}
    missing = [name for name in stats if name not in gradient]
    if missing:
        msg = f"compare: gradient lacks the layers {missing}; see fl.mean_gradient."
        raise ValueError(msg)
    found = {}
    for name in stats:
        one = gradient[name]
        w = one.gradient if isinstance(one, MeanGradient) else one
        if tuple(w.shape) != stats[name].weight_shape:
            msg = (
                f"compare: the gradient of {name!r} has shape {tuple(w.shape)}, "
                f"{stats[name].weight_shape} is expected."
            )
            raise ValueError(msg)
        found[name] = w
    return found
