"""The verdict of a result: sentences with their numbers; a Dataset in, words out."""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import xarray as xr

from fisherlab.analysis.contests import Contest, coarse
from fisherlab.analysis.files import judged
from fisherlab.analysis.verdicts import contests, damping_verdict
from fisherlab.plots import frames
from fisherlab.plots.costs import undominated
from fisherlab.report.rankings import (
    Moment,
    Standing,
    contest,
    damping_kind,
    moment,
    standings,
)
from fisherlab.showing import error_text, layers, percent, quoted, span


@dataclass(frozen=True)
class Sentence:
    """One finding in words, with the topic it is about and where its numbers lie.

    The headline answers; details are folded on a page.

    Examples
    --------
    >>> Sentence("closest", "`kfac` is closest.").topic
    'closest'
    """

    topic: str
    headline: str
    source: str = ""
    details: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(filter(None, (self.headline, self.details)))


def verdict(ds: xr.Dataset) -> tuple[Sentence, ...]:
    """Say in sentences which approximation serves which purpose, and at what cost.

    The last step and the middle damping are judged, the trajectory is told apart. A
    result without purposes is judged by its metrics.

    Examples
    --------
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac", "diagonal"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4, 0.8]])}, coords)
    >>> ds["fisher_norm"] = "layer", [1.0]
    >>> verdict(ds)[0].text
    '`kfac` is the closest to the exact block by relative error: 0.4, then `diagonal` with \
0.8 (leads are not held against noise).'
    """
    m = moment(ds)
    found = judgements(ds, m)
    if not found:
        return tuple(one for one in (_nothing(m), _dead(m)) if one is not None)
    told = [
        *(
            Sentence(topic, one.headline(), SOURCES.get(topic, ""), one.details())
            for topic, one in found.items()
        ),
        *(Sentence("damping", one, "slope, curvature") for one in damping_verdict(ds)),
        _front(standings(m)),
        _dead(m),
        _training(ds),
        _noise(ds, m),
        _scale(m),
        _loose(m),
    ]
    return tuple(sentence for sentence in told if sentence is not None)


SOURCES: Final = {
    "matrix": "frobenius_error",
    "direction": "direction_cosine",
    "inverse": "inverse_error",
}


def judgements(ds: xr.Dataset, m: Moment) -> dict[str, Contest]:
    """Return a contest a purpose: those of the result, and those that its metrics make."""
    found = contests(ds)
    metrics = {"matrix": "frobenius_error"}
    if not found:
        metrics |= {"direction": "direction_cosine", "inverse": "inverse_error"}
    for topic, metric in metrics.items():
        one = contest(ds, m, metric)
        if one is not None and topic not in found:
            damped = metric in m.damped
            setting = damping_words(ds, m).strip().removeprefix("at ") if damped else ""
            for other in found.values():
                one = one.knowing(other)
            found[topic] = replace(one, setting=setting)
    return found


def _nothing(m: Moment) -> Sentence:
    reasons = sorted({str(word) for word in m.status.ravel() if str(word) != "ok"})
    why = f" Reasons given: {'; '.join(reasons)}." if reasons else ""
    text = f"No approximation could be set beside the exact block.{why}"
    return Sentence("closest", text)


def _dead(m: Moment) -> Sentence | None:
    """Say in which layers there is nothing to approximate."""
    dead = [name for name, alive in zip(m.titles, m.alive, strict=True) if not alive]
    if not dead:
        return None
    text = (
        f"The exact block is zero in {layers(dead)}, {len(dead)} of {len(m.layers)}: no "
        "output depends on them at this moment, as in a network whose training died. "
        "Nothing is compared there."
    )
    return Sentence("caution", text, "fisher_norm")


def _front(ranking: tuple[Standing, ...]) -> Sentence | None:
    known = [s for s in ranking if np.isfinite(s.share) and s.complete]
    if len(known) < 2:
        return None
    front = undominated([(s.share, s.error) for s in known])
    chosen = [s for s in known if (s.share, s.error) in front]
    chosen.sort(key=lambda s: s.share)
    told = ", ".join(
        f"`{s.name}` ({percent(s.share)}, error {error_text(s.error)})" for s in chosen
    )
    if len(chosen) == 1:
        text = f"Of those with all layers none is smaller or closer than {told}."
    else:
        dominated = "" if len(chosen) == len(known) else "; each other one is dominated"
        among = "" if len(known) == len(ranking) else "of those with all layers "
        text = f"Per stored number the choice {among}is between {told}{dominated}."
    return Sentence("cost", text, "stored_numbers")


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


def _training(ds: xr.Dataset) -> Sentence | None:
    """Tell how the error of the closest moves, where all of a moment can be ranked."""
    steps = [] if "step" not in ds.dims else [int(s) for s in ds["step"].values]
    moments = [moment(ds, step) for step in steps]
    ranked = [contest(ds, m, "frobenius_error") for m in moments]
    known = [one for one in ranked if one is not None and one.complete and not one.partial]
    if len(steps) < 2 or len(known) < len(steps):
        return None
    first = known[-1].complete[0]
    means = [one.of(first) for one in (known[0], known[-1])]
    if not np.isfinite(means).all():
        return None
    led = sum(one.complete[0] == first for one in known)
    way = "falls" if means[1] < means[0] else "grows"
    moves = (
        f"stays at {error_text(means[1])}"
        if np.isclose(means[0], means[1], rtol=0.01)
        else f"{way} from {error_text(means[0])} to {error_text(means[1])}"
    )
    text = (
        f"From step {steps[0]} to step {steps[-1]} the error of `{first}` "
        f"{moves} ({moments[-1].average}); it is the closest overall at "
        f"{led} of {len(steps)} moments of training."
    )
    return Sentence("training", text, f"frobenius_error[approximator={first}]")


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
    table = judged(ds)
    errors = table.get("network_lead_error")
    if errors is not None and bool(errors.notnull().any()):
        of_queries = "queries" in table.get("lead_noise", ())
        queries = " (of influences over the queries)" * of_queries
        parts.append(
            "Where a lead stands with ±, that is two standard errors over the examples of "
            f"the exact blocks{queries}, the methods held as they are."
        )
    source = "noise_floor, below_noise, tied_with_best, purpose_network_lead_error"
    return Sentence("noise", " ".join(parts), source) if parts else None


def _marked(m: Moment, name: str, *, single: bool = True) -> str:
    """List approximations marked 1, with the layers; alone in a layer only if told."""
    marks = m.grid(name) == 1
    rows = marks.sum(axis=1) >= (1 if single else 2)
    told = []
    for j, method in enumerate(m.approximators):
        at = [m.titles[i] for i in np.flatnonzero(marks[:, j] & rows)]
        if at and method != "exact":
            told.append(f"`{method}` in {layers(at)}")
    return ", ".join(told)


def _scale(m: Moment) -> Sentence | None:
    errors = m.grid("frobenius_error")
    over = {
        name: [m.titles[i] for i in np.flatnonzero(errors[:, j] > 1)]
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


def _loose(m: Moment) -> Sentence | None:
    loose = [name for name in m.approximators if (m.column("converged", name) == 0).any()]
    if not loose:
        return None
    text = (
        f"The iteration did not converge for {quoted(loose)}: a converged one is at least "
        "as close."
    )
    return Sentence("caution", text, "converged")


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
    for i, layer in enumerate(m.titles):
        for j, name in enumerate(m.approximators):
            why = str(m.status[i, j])
            if why in {"ok", "", "nan"}:
                why = "no value and no reason was recorded"
                if errors is None or np.isfinite(errors[i, j]):
                    continue
            found.setdefault((name, coarse(why)), []).append(layer)
    return tuple((name, tuple(at), why) for (name, why), at in found.items())
