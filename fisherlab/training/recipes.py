"""How optimisers of one family are made from settings that papers give."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Final, final

from torch import Tensor
from torch.optim import Optimizer

from fisherlab.approximators.mean_gradients import MuonPreconditioner
from fisherlab.likelihoods import Bernoulli, Categorical, Gaussian
from fisherlab.operators.base import Damping, Factored, RelativeDamping, Tikhonov
from fisherlab.problems.problem import Problem
from fisherlab.statistics import Empirical, Fisher, MonteCarlo
from fisherlab.training.adaptive_kfac import AdaptiveKFAC
from fisherlab.training.moves import KLClip
from fisherlab.training.natural_gradient import NaturalGradient
from fisherlab.training.schedules import LevenbergMarquardt, Order, Ramped

_KOROKO: Final = {
    "lr": 0.01,
    "damping": 1e-4,
    "momentum": 0.9,
    "statistics_every": 100,
    "inverse_every": 100,
    "average": Ramped(0.95),
    "statistics_fraction": 0.25,
    "clip": KLClip(1e-2, "direction"),
    "weight_decay": 0.0,
    "fallback": "gradient",
    "fisher": None,  # one sampled label of each example
    "seed": 0,
}
_GOLDFARB: Final = {  # momentum of the gradient, a plain average after a warm start
    "lr": 1e-3,
    "damping": 1e-3,
    "momentum": 0.9,
    "momentum_of": "gradient",
    "statistics_every": 1,
    "inverse_every": 20,
    "burn_in": 20,
    "average": 0.9,
    "weight_decay": 0.0,
    "clip": None,
    "fallback": "gradient",
    "seed": 0,
    "warm_start": 1000,
}
_PLAIN: Final = {
    "lr": 1e-2,
    "damping": 1e-2,
    "momentum": 0.9,
    "statistics_every": 1,
    "inverse_every": 20,
    "burn_in": 3,
    "average": Ramped(0.95),
    "statistics_fraction": 1.0,
    "clip": None,
    "weight_decay": 0.0,
    "fallback": "gradient",
    "seed": 0,
}
_FULL: Final = {
    "lr": 1.0,
    "damping": None,
    "l2": 1e-5,
    "inverse_every": 20,
    "momentum": True,
    "fallback": "gradient",
    "seed": 0,
}
INVERSE_FREE: Final = {  # the first steps are plain gradients: SGD's rate, a clip for later
    "lr": 0.1,
    "clip": KLClip(1e-2, "step"),
    "statistics_every": 10,
    "inverse_every": 10,
}
OWN_STATE: Final = {"average": 0.0, "burn_in": 0, "warm_start": None}

_KOROKO_SOURCE: Final = "Koroko et al. 2022, arXiv 2201.10285, and its public code"
MBF_SOURCE: Final = "Bahamou, Goldfarb & Ren 2022, arXiv 2202.04124"
KFAC_SOURCE: Final = "Martens & Grosse 2015, arXiv 1503.05671"


@final
@dataclass(frozen=True)
class Recipe:
    """How a named optimiser is made for a problem.

    Parameters
    ----------
    summary
        What it is, in one line.
    source
        Where method and settings come from.
    make
        From a problem and all settings to the optimiser.
    settings
        What may be set, with the defaults.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.training.optimizers()["adam"].settings["betas"]
    (0.9, 0.999)
    """

    summary: str
    source: str
    make: Callable[..., Optimizer] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the defaults such as nobody changes."""
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings as a plain mapping."""
        return Recipe, (self.summary, self.source, self.make, dict(self.settings))

    def __call__(self, problem: Problem, **settings: Any) -> Optimizer:
        """Return the optimiser over the parameters of the problem's model.

        Raises
        ------
        ValueError
            If a setting is unknown; the known ones are listed.
        """
        unknown = [name for name in settings if name not in self.settings]
        if unknown:
            raise ValueError(
                f"optimizer: {', '.join(map(repr, unknown))} cannot be set; known: "
                f"{', '.join(self.settings)}."
            )
        return self.make(problem, **{**self.settings, **settings})


def _first_order(kind: Callable[..., Optimizer], problem: Problem, **settings: Any) -> Any:
    return kind([p for p in problem.model.parameters() if p.requires_grad], **settings)


def _natural(
    problem: Problem,
    make_method: Callable[[float], Any],
    make_damping: Callable[[float], Any],
    *,
    damping: float | Damping,
    fisher: Callable[[int], Fisher],
    seed: int,
    warm_start: int | None = None,
    **settings: Any,
) -> NaturalGradient:
    """Make a natural gradient from λ, a seed, and the batch size of a warm start."""
    number: Any = damping.value if isinstance(damping, (Tikhonov, Factored)) else damping
    made = NaturalGradient(
        problem.model,
        problem.likelihood,
        make_method(number),
        damping=_damping(damping, make_damping),
        fisher=fisher(seed),
        **settings,
    )
    if warm_start is not None:
        made.warm_start(_epoch(problem, warm_start, seed))
    return made


def _damping(given: float | Damping, make: Callable[[float], Any]) -> Any:
    """Return a damping as it is given, or that of the recipe for a number."""
    return make(given) if isinstance(given, (int, float)) else given


def _epoch(problem: Problem, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the minibatches of one pass over the training data."""
    x, y = problem.train
    order = Order(len(x), batch_size, seed)
    for step in range(max(1, len(x) // batch_size)):
        here = order.indices(step).to(x.device)
        yield x[here], y[here]


def _koroko(
    problem: Problem,
    method: Any,
    terms: int,
    *,
    lr: float,
    damping: float | Damping,
    fisher: Fisher | None,
    seed: int,
    **settings: Any,
) -> NaturalGradient:
    """Make an optimiser of Koroko et al. from η and λ in the units of their code.

    Their losses are means over the outputs: with s the factor to the sum, F = s² F_paper
    and ∇ = s ∇_paper. Damped factors G + √λ and A + √λ of theirs are ``Factored(s²λ,
    pi=1/s)`` of ours, and with λ itself on both factors, as for two terms, s²λ².
    """
    s = _output_scale(problem)

    def theirs(value: float) -> Factored:
        ours = (s * value) ** 2 if terms == 2 else s**2 * value
        return Factored(ours, pi=1 / s, mode="abs" if terms == 2 else "clip")

    return NaturalGradient(
        problem.model,
        problem.likelihood,
        method,
        lr=s * lr,
        damping=_damping(damping, theirs),
        fisher=fisher or MonteCarlo(1, seed),
        **settings,
    )


def _output_scale(problem: Problem) -> float:
    """Return the factor from a loss that is a mean over outputs to ours.

    Raises
    ------
    ValueError
        For a Gaussian likelihood with another variance than 1.
    """
    likelihood, (_, y) = problem.likelihood, problem.train
    if isinstance(likelihood, Categorical):
        return 1.0
    if isinstance(likelihood, Bernoulli):
        return float(y[0].numel())
    if isinstance(likelihood, Gaussian) and likelihood.variance == 1:
        return y[0].numel() / 2
    raise ValueError(
        f"The settings of Koroko et al. have no translation for {likelihood!r}; Bernoulli, "
        "Categorical and Gaussian(variance=1) have one."
    )


def _full(
    problem: Problem,
    method: Any,
    *,
    damping: float | Damping | None,
    seed: int,
    **settings: Any,
) -> AdaptiveKFAC:
    """Make the full K-FAC optimiser from its first λ, which `LevenbergMarquardt` adapts.

    None is a share of the first loss.

    Raises
    ------
    ValueError
        For a damping that is no number.
    """
    if not isinstance(damping, (int, float, type(None))):
        raise ValueError(
            f"optimizer: damping={damping!r} was given; LevenbergMarquardt adapts the λ of "
            "this optimiser, whose first value, a number, is expected."
        )
    return AdaptiveKFAC(
        problem.model,
        problem.likelihood,
        method,
        damping=LevenbergMarquardt(damping),
        fisher=MonteCarlo(1, seed),
        **settings,
    )


def always(value: Any) -> Callable[[Any], Any]:
    """Return a function that ignores its argument."""
    return partial(_first, value)


def _first(value: Any, _: Any) -> Any:
    return value


def sampled(seed: int) -> Fisher:
    """Return the Fisher with one label drawn an example."""
    return MonteCarlo(1, seed)


def from_data(seed: int) -> Fisher:
    """Return the Fisher with the labels of the data."""
    return Empirical()


def unit_ratio(damping: float) -> Factored:
    """Return a factored damping that adds √λ to both factors."""
    return Factored(damping, pi=1.0)


def plain(
    summary: str,
    source: str,
    method: Any,
    make_damping: Callable[[float], Any] = float,
    **settings: Any,
) -> Recipe:
    """Return a recipe with a ramped average and momentum of directions."""
    make = partial(
        _natural,
        make_method=always(method),
        make_damping=make_damping,
        fisher=sampled,
    )
    return Recipe(summary, source, make, {**_PLAIN, **settings})


def of_goldfarb(
    summary: str,
    source: str,
    make_method: Callable[[float], Any],
    make_damping: Callable[[float], Any],
    fisher: Callable[[int], Fisher],
    **settings: Any,
) -> Recipe:
    """Return a recipe with a warm start and momentum of gradients."""
    make = partial(
        _natural, make_method=make_method, make_damping=make_damping, fisher=fisher
    )
    return Recipe(summary, source, make, {**_GOLDFARB, **settings})


def of_muon(summary: str, source: str, **settings: Any) -> Recipe:
    """Return a recipe of Muon: its matrix is that of the momentum which it turns."""
    known = {**_GOLDFARB, **OWN_STATE, "inverse_every": 1, **settings}
    return Recipe(summary, source, _muon, known)


def _muon(problem: Problem, *, momentum: float, **settings: Any) -> NaturalGradient:
    return _natural(
        problem,
        always(MuonPreconditioner(momentum)),
        RelativeDamping,
        fisher=from_data,
        momentum=momentum,
        **settings,
    )


def of_koroko(summary: str, method: Any, terms: int, **settings: Any) -> Recipe:
    """Return a recipe of Koroko et al., η and λ in their units."""
    make = partial(_koroko, method=method, terms=terms)
    return Recipe(summary, _KOROKO_SOURCE, make, {**_KOROKO, **settings})


def of_torch(
    summary: str, source: str, kind: Callable[..., Optimizer], **settings: Any
) -> Recipe:
    """Return a recipe of an optimiser of torch."""
    make = partial(_first_order, kind)
    return Recipe(summary, source, make, settings)


def of_full(summary: str, source: str, method: Any) -> Recipe:
    """Return the full K-FAC optimiser with a method."""
    return Recipe(summary, source, partial(_full, method=method), _FULL)
