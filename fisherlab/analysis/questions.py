"""What a comparison asks: which metrics, at which dampings, along which gradient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisherlab import metrics as formulas
from fisherlab.analysis.damping import Dampings
from fisherlab.statistics import MeanGradient, Statistics

PLAIN: dict[str, tuple[Callable[..., float], str]] = {
    "frobenius_error": (formulas.frobenius_error, "relative Frobenius error"),
    "cosine_similarity": (formulas.cosine_similarity, "matrix cosine"),
    "trace_ratio": (formulas.trace_ratio, "trace ratio"),
}
DAMPED = {
    "inverse_error": "relative error of the damped inverse",
    "direction_cosine": "cosine of the update directions",
}
LABELS = (
    {name: label for name, (_, label) in PLAIN.items()}
    | DAMPED
    | {
        "lambda": "damping λ",
        "mean_eigenvalue": "mean eigenvalue tr F / p",
        "fisher_norm": "Frobenius norm of the exact block",
        "stored_numbers": "numbers held by the approximation",
        "solve_flops": "multiply-adds of one preconditioning",
        "converged": "1 converged, 0 not, -1 no iteration",
        "status": "ok, or why a value is missing",
    }
)


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of every cell."""

    metrics: tuple[str, ...]
    dampings: Dampings
    gradient: Mapping[str, Tensor]
    mixed: bool


def question(
    wanted: Sequence[str] | None,
    levels: Dampings,
    gradient: Mapping[str, Any] | None,
    stats: Statistics,
    mixed: bool,
) -> Question:
    """Check what is asked and make it complete.

    Raises
    ------
    ValueError
        For unknown metrics, metrics without what they need, or unfit gradients.
    """
    directions = _directions(gradient, stats)
    return Question(_metrics(wanted, levels, directions), levels, directions, mixed)


def _metrics(
    wanted: Sequence[str] | None, levels: Dampings, gradient: Mapping[str, Tensor]
) -> tuple[str, ...]:
    possible = list(PLAIN)
    if levels.labels:
        possible += ["inverse_error"] + (["direction_cosine"] if gradient else [])
    if wanted is None:
        return tuple(possible)
    known = [*PLAIN, *DAMPED]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        msg = f"compare: metrics {unknown} are unknown; known: {', '.join(known)}."
        raise ValueError(msg)
    lacking = [name for name in wanted if name not in possible]
    if lacking:
        msg = (
            f"compare: {', '.join(lacking)} needs `damping`"
            f"{' and `gradient`' if 'direction_cosine' in lacking else ''}."
        )
        raise ValueError(msg)
    return tuple(wanted)


def _directions(gradient: Mapping[str, Any] | None, stats: Statistics) -> dict[str, Tensor]:
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
