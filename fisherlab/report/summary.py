"""The verdict of a result: sentences with their numbers; a Dataset in, words out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from fisherlab.catalogue import below_floor, overall
from fisherlab.plots import frames
from fisherlab.plots.costs import undominated
from fisherlab.report.rankings import Standing, spread, standings, winners
from fisherlab.report.snapshot import Grid, Moment, damping_kind, moment
from fisherlab.report.text import error_text, layers, percent, quoted, span


@dataclass(frozen=True)
class Sentence:
    """One finding in words, with the topic it is about and where its numbers lie.

    Examples
    --------
    >>> Sentence("closest", "`kfac` is closest.").topic
    'closest'
    """

    topic: str
    text: str
    source: str = ""


def verdict(ds: xr.Dataset) -> tuple[Sentence, ...]:
    """Say in sentences which approximation is best, by how much, at what cost.

    The last step and the middle damping are judged, the trajectory is told apart.

    Examples
    --------
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac", "diagonal"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4, 0.8]])}, coords)
    >>> print(verdict(ds)[0].text)
    `kfac` is the closest to the exact block in 1 of 1 layers: relative error 0.400, \
2 times smaller than the runner-up's, `diagonal` (0.800).
    """
    m = moment(ds)
    ranking = standings(m)
    if not ranking:
        return (_nothing(m),)
    told = [
        _closest(m, ranking),
        _cost(ranking),
        _meaning(ds, m, ranking),
        _training(ds, ranking[0]),
        _noise(ds, m),
        _scale(m),
        _missing(m),
    ]
    return tuple(sentence for sentence in told if sentence is not None)


def _nothing(m: Moment) -> Sentence:
    reasons = sorted({str(word) for word in m.status.ravel() if str(word) != "ok"})
    why = f" Reasons given: {'; '.join(reasons)}." if reasons else ""
    return Sentence(
        "closest", f"No approximation could be set beside the exact block.{why}"
    )


def _closest(m: Moment, ranking: tuple[Standing, ...]) -> Sentence:
    first, best = ranking[0], winners(m)
    source = m.cell("frobenius_error", "*", first.name)
    if below_floor(first.highest):
        tied = [s.name for s in ranking if below_floor(s.highest)]
        text = f"{quoted(tied)} equal the exact block to the numerical floor (1e-6)."
        return Sentence("closest", text, source)
    text = (
        f"`{first.name}` is the closest to the exact block in {first.won} of "
        f"{len(best)} layers: relative error {spread(first)}"
    )
    return Sentence("closest", text + _lead(ranking) + "." + _rivals(first, best), source)


def _lead(ranking: tuple[Standing, ...]) -> str:
    if len(ranking) < 2:
        return ""
    first, second = ranking[:2]
    factor, worse = second.error / first.error, error_text(second.error)
    if factor < 1.005:
        return f", no better than the runner-up, `{second.name}` ({worse})"
    times = f"{factor:.2f}" if factor < 2 else f"{factor:.3g}"
    return f", {times} times smaller than the runner-up's, `{second.name}` ({worse})"


def _rivals(first: Standing, best: Mapping[str, tuple[str, ...]]) -> str:
    lost = {layer: names for layer, names in best.items() if first.name not in names}
    if not lost:
        return ""
    by_name: dict[str, list[str]] = {}
    for layer, names in lost.items():
        by_name.setdefault(names[0], []).append(layer)
    told = [f"`{name}` in {layers(at)}" for name, at in by_name.items()]
    return f" Elsewhere the closest is {', '.join(told)}."


def _cost(ranking: tuple[Standing, ...]) -> Sentence | None:
    first = ranking[0]
    if not np.isfinite(first.share):
        return None
    share = percent(first.share)
    text = f"`{first.name}` holds {share} of the numbers of the exact blocks"
    if np.isfinite(first.flops):
        text += f", and one solve with it takes {percent(first.flops)} of the flops"
    source = "stored_numbers, solve_flops"
    return Sentence("cost", f"{text}.{_front(ranking)}", source)


def _front(ranking: tuple[Standing, ...]) -> str:
    known = [s for s in ranking if np.isfinite(s.share)]
    front = undominated([(s.share, s.error) for s in known])
    if len(known) < 2:
        return ""
    chosen = [s for s in known if (s.share, s.error) in front]
    chosen.sort(key=lambda s: s.share)
    told = ", ".join(
        f"`{s.name}` ({percent(s.share)}, error {error_text(s.error)})" for s in chosen
    )
    if len(chosen) == 1:
        return f" No other is smaller or closer: {told}."
    dominated = "" if len(chosen) == len(known) else "; each other one is dominated"
    return f" Per stored number the choice is between {told}{dominated}."


def _meaning(ds: xr.Dataset, m: Moment, ranking: tuple[Standing, ...]) -> Sentence | None:
    first = ranking[0]
    if not any(np.isfinite([s.direction, s.inverse]).any() for s in ranking):
        return None
    cosines = m.column("direction_cosine", first.name)
    inverses = m.column("inverse_error", first.name)
    parts = []
    if np.isfinite(cosines).any():
        parts.append(
            f"the damped natural gradient of `{first.name}` has cosine "
            f"{span(cosines)} with the exact one{_in_part(m, cosines)}"
        )
    if np.isfinite(inverses).any():
        off = span(inverses, error_text)
        parts.append(f"its damped inverse is off by {off} (relative)")
    told = (
        " and ".join(parts)
        or f"`{first.name}` gives no damped inverse (reasons under Numbers)"
    )
    text = f"{damping_words(ds, m)}{told}.{_other_order(ranking)}"
    source = "direction_cosine, inverse_error"
    return Sentence("meaning", text[0].upper() + text[1:], source)


def _in_part(m: Moment, values: Grid) -> str:
    known = int(np.isfinite(values).sum())
    return "" if known == len(m.layers) else f" in {known} of {len(m.layers)} layers"


def _other_order(ranking: tuple[Standing, ...]) -> str:
    first, told = ranking[0], []
    if not first.in_all and np.isfinite([first.direction, first.inverse]).any():
        return ""  # medians over other layers are no contest
    ranking = (first, *(s for s in ranking[1:] if s.in_all))
    # A first place without a value (NaN) is behind every other one.
    ahead = max(ranking, key=lambda s: np.nan_to_num(s.direction, nan=-2.0))
    if np.isfinite(ahead.direction) and not ahead.direction <= first.direction + 5e-4:
        told.append(f"by direction `{ahead.name}` ({ahead.direction:.3f})")
    ahead = min(ranking, key=lambda s: np.nan_to_num(s.inverse, nan=np.inf))
    if np.isfinite(ahead.inverse) and not ahead.inverse >= first.inverse * 0.995:
        told.append(f"by the inverse `{ahead.name}` ({error_text(ahead.inverse)})")
    if told:
        return f" The closest is {' and '.join(told)} (medians over the layers)."
    return " By these it is the closest too."


def damping_words(ds: xr.Dataset, m: Moment) -> str:
    """Write the damping of a moment as it was asked for and as λ.

    Examples
    --------
    >>> import numpy as np
    >>> import xarray as xr
    >>> m = Moment(None, 0.01, (), (), (), {}, np.empty((0, 0)))
    >>> damping_words(xr.Dataset(attrs={"damping_kind": "relative"}), m)
    'at α = 0.01 (relative to the mean eigenvalue) '
    """
    if m.damping is None:
        return ""
    kind, size = damping_kind(ds, m.damping), m.level.split()[-1]
    if kind == "factored":
        return f"at λ = {size} on the factors (beside the exact block with λI) "
    if kind != "relative":
        return f"at λ = {size} "
    if "lambda" not in ds:
        return f"at α = {size} (relative to the mean eigenvalue) "
    lam = ds["lambda"]
    lam = lam.sel(damping=m.damping) if "damping" in lam.dims else lam
    lam = lam.sel(step=m.step) if "step" in lam.dims else lam
    return f"at α = {size} (λ = {span(np.asarray(lam.values).ravel())}) "


def _training(ds: xr.Dataset, first: Standing) -> Sentence | None:
    steps = [] if "step" not in ds.dims else [int(s) for s in ds["step"].values]
    if len(steps) < 2:
        return None
    start, end = (moment(ds, step) for step in (steps[0], steps[-1]))
    means = [
        overall(m.column("frobenius_error", first.name), m.norms) for m in (start, end)
    ]
    leaders = [standings(moment(ds, step)) for step in steps]
    led = sum(bool(rank) and rank[0].name == first.name for rank in leaders)
    way = "falls" if means[1] < means[0] else "grows"
    moves = (
        f"stays at {error_text(means[1])}"
        if np.isclose(means[0], means[1], rtol=0.01)
        else f"{way} from {error_text(means[0])} to {error_text(means[1])}"
    )
    text = (
        f"From step {steps[0]} to step {steps[-1]} the error of `{first.name}` "
        f"{moves} ({end.average}); it is the closest overall at "
        f"{led} of {len(steps)} moments of training."
    )
    return Sentence("training", text, f"frobenius_error[approximator={first.name}]")


def _noise(ds: xr.Dataset, m: Moment) -> Sentence | None:
    """Say how well the reference is known, and what cannot be told from the closest."""
    parts = []
    if "noise_floor" in ds:
        floors = frames.pick(ds["noise_floor"], "step", m.step)
        levels = np.asarray(floors.values, dtype=float).ravel()
        parts.append(
            "Judged by random halves of the data, the exact blocks themselves are "
            f"{span(levels, error_text)} (relative) away from those of unlimited data; "
            "a smaller error says nothing about the distribution behind the data."
        )
    within = _marked(m, "below_noise")
    if within:
        parts.append(f"Within that noise: {within}.")
    tied = _marked(m, "tied_with_best", single=False)
    if tied:
        level = float(ds.attrs.get("confidence", 0.95))
        parts.append(f"Not told apart from the closest at {percent(level)}: {tied}.")
    source = "noise_floor, below_noise, tied_with_best"
    return Sentence("noise", " ".join(parts), source) if parts else None


def _marked(m: Moment, name: str, *, single: bool = True) -> str:
    """List approximations marked 1, with the layers; alone in a layer only if told."""
    marks = m.grid(name) == 1
    rows = marks.sum(axis=1) >= (1 if single else 2)
    told = []
    for j, method in enumerate(m.approximators):
        at = [m.layers[i] for i in np.flatnonzero(marks[:, j] & rows)]
        if at and method != "exact":
            told.append(f"`{method}` in {layers(at)}")
    return ", ".join(told)


def _scale(m: Moment) -> Sentence | None:
    errors = m.grid("frobenius_error")
    over = {
        name: [m.layers[i] for i in np.flatnonzero(errors[:, j] > 1)]
        for j, name in enumerate(m.approximators)
    }
    told = [f"`{name}` in {layers(at)}" for name, at in over.items() if at]
    if not told:
        return None
    text = (
        f"Farther from the exact block than the zero matrix (error above 1): "
        f"{', '.join(told)}. The matrix cosine tells how much of it is scale alone."
    )
    return Sentence("caution", text, "frobenius_error, cosine_similarity")


def _missing(m: Moment) -> Sentence | None:
    failed = [name for name, _, _ in unavailable(m) if name != "exact"]
    failed = list(dict.fromkeys(failed))
    absent = [n for n in failed if np.isnan(m.column("frobenius_error", n)).all()]
    partial = [name for name in failed if name not in absent]
    parts = []
    if absent:
        parts.append(f"Not available: {quoted(absent)} (reasons under Numbers).")
    if partial:
        parts.append(
            f"Some metrics of {quoted(partial)} are not available (reasons under Numbers)."
        )
    loose = [name for name in m.approximators if (m.column("converged", name) == 0).any()]
    if loose:
        parts.append(
            f"The iteration did not converge for {quoted(loose)}: a converged one "
            "is at least as close."
        )
    return Sentence("caution", " ".join(parts), "status, converged") if parts else None


def unavailable(m: Moment) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """List what is missing: (approximation, layers, reason in words).

    Examples
    --------
    >>> import numpy as np
    >>> status = np.array([["no shared form"], ["ok"]])
    >>> grid = {"frobenius_error": np.array([[np.nan], [np.nan]])}
    >>> m = Moment(None, None, ("a", "b"), ("kfac",), ("", ""), grid, status)
    >>> unavailable(m)[0]
    ('kfac', ('a',), 'no shared form')
    >>> unavailable(m)[1][2]
    'no value and no reason was recorded'
    """
    found: dict[tuple[str, str], list[str]] = {}
    errors = m.grids.get("frobenius_error")
    for i, layer in enumerate(m.layers):
        for j, name in enumerate(m.approximators):
            why = str(m.status[i, j])
            if why in {"ok", "", "nan"}:
                why = "no value and no reason was recorded"
                if errors is None or np.isfinite(errors[i, j]):
                    continue
            found.setdefault((name, _coarse(why)), []).append(layer)
    return tuple((name, tuple(at), why) for (name, why), at in found.items())


def _coarse(why: str) -> str:
    """Leave the counts out of what is left out for size, so that layers share a line."""
    parts = why.split("; ")
    return "; ".join(
        re.sub(r" \(.*\)", "", part) if part.startswith("left out for size") else part
        for part in parts
    )
