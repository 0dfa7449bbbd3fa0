"""From preconditioned directions to parameters: momentum, clipping, decay, groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from fisherlab.errors import NumericalError
from fisherlab.layers import Block, select
from fisherlab.layers import blocks as blocks_of
from fisherlab.numerics import devices
from fisherlab.operators.base import require_damping
from fisherlab.settings import is_number, setting

Form = Literal["step", "direction"]
_INFINITY = float("inf")
_FLOOR = 1e-8  # of the published code


@final
@setting
class KLClip:
    r"""Shorten all directions d together if the Kullback-Leibler estimate is above κ.

    .. math:: \text{step: } ν = \min\Big(1, \sqrt{κ / \textstyle\sum η^2 ⟨d, ∇⟩}\Big),
              \qquad
              \text{direction: } ν =
              \min\Big(1, \sqrt{κ / (\textstyle\sum |⟨d, ∇⟩| + 10^{-8})}\Big)

    With :math:`d = F^{-1} ∇`, :math:`η^2 ⟨d, ∇⟩ / 2` is the divergence of a step of
    length η to second order.

    Parameters
    ----------
    bound
        κ > 0.
    form
        "step" counts the learning rate η of each parameter, "direction" does not.

    Raises
    ------
    ValueError
        If κ is not positive or the form unknown.

    References
    ----------
    "step": Ba, Grosse & Martens 2017, section 5, as public K-FAC codes have it
    (κ = 1e-3). "direction": code of Koroko et al. 2022, arXiv 2201.10285 (κ = 1e-2).

    Examples
    --------
    >>> pairs = [(0.1, torch.tensor(4.0))]
    >>> round(KLClip(0.01).scale(pairs).item(), 4)
    0.5
    >>> round(KLClip(0.04, "direction").scale(pairs).item(), 4)
    0.1
    """

    bound: float
    form: Form = "step"

    def __post_init__(self) -> None:
        """Check κ and the form."""
        if not self.bound > 0 or self.form not in ("step", "direction"):
            msg = f"{self!r}: a positive bound and 'step' or 'direction' are expected."
            raise ValueError(msg)

    def scale(self, pairs: Sequence[tuple[float, Tensor]]) -> Tensor:
        """Return ν from pairs of a learning rate and an inner product ⟨d, ∇⟩."""
        inner = torch.stack([product for _, product in pairs])
        if self.form == "direction":
            total = inner.abs().sum() + _FLOOR
        else:
            total = torch.stack([rate**2 * product for rate, product in pairs]).sum()
        # a direction that ascends has no positive estimate; it is left as it is
        ratio = torch.where(total > 0, self.bound / total, torch.ones_like(total))
        return ratio.sqrt().clamp_max(1)


LOW_PRECISION = (torch.float16, torch.bfloat16)


@final
@dataclass(frozen=True, eq=False)
class Parameters:
    """The parameters of an optimiser, seen as blocks of a model.

    Parameters
    ----------
    named
        All parameters of the model by name.
    blocks
        Those that are optimised.
    groups
        Groups of parameters, each with "lr", "momentum", "weight_decay" and "damping".
    """

    named: Mapping[str, nn.Parameter]
    blocks: Mapping[str, Block]
    groups: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, model: nn.Module, who: str
    ) -> "Parameters":
        """Return what an optimiser of a model moves now.

        Raises
        ------
        ValueError
            If it holds parameters that the model has no more, or parts of blocks.
        """
        named, groups = dict(model.named_parameters()), optimizer.param_groups
        ours = {id(p): name for name, p in named.items()}
        held = [id(p) for group in groups for p in group["params"]]
        gone = sum(key not in ours for key in held)
        if gone:
            raise ValueError(
                f"{who}: {gone} of its parameters are the model's no more; a layer was "
                "replaced since. Set the params of its param_groups to the new ones, or "
                "make a new optimiser."
            )
        names = {ours[key] for key in held}
        return cls(named, chosen(blocks_of(model), names), groups)

    def setting(self, key: str) -> dict[str, Any]:
        """Return a setting of the groups by parameter name."""
        values = {p: group[key] for group in self.groups for p in group["params"]}
        return {name: values[p] for name, p in self.named.items() if p in values}

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one weight for every block that some tensor belongs to, zeros added."""
        found = {}
        for name, block in self.blocks.items():
            known = {n: tensors[n] for n in block.parameters if n in tensors}
            if known:
                missing = [n for n in block.parameters if n not in known]
                known |= {n: torch.zeros_like(self.named[n]) for n in missing}
                found[name] = block.pack(known)
        return found

    def unpack(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by parameter name from weights by block."""
        return {
            parameter: tensor
            for name, weight in weights.items()
            for parameter, tensor in self.blocks[name].unpack(weight).items()
        }


def chosen(found: Mapping[str, Block], parameters: set[str]) -> dict[str, Block]:
    """Return the blocks of some parameters.

    Raises
    ------
    ValueError
        If a block has one parameter among them and another one not.
    """
    names = [name for name, b in found.items() if parameters.intersection(b.parameters)]
    split = [n for n in names if not parameters.issuperset(found[n].parameters)]
    if split:
        parts = ", ".join(
            f"{name!r} ({', '.join(found[name].parameters)})" for name in split
        )
        raise ValueError(
            f"The parameters of the blocks {parts} share one curvature, but only some of "
            "them are optimised. Give all of them, or freeze the others."
        )
    return select(found, names) if names else {}


State = Mapping[Any, dict[str, Tensor]]


def match_(state: State) -> None:
    """Put what is remembered on the device and in the precision of its parameter."""
    for parameter, kept in state.items():
        for name, tensor in kept.items():
            kept[name] = tensor.to(parameter.device, parameter.dtype)


def momenta(
    parameters: Parameters, state: State, gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return μ m + ∇h of every block, and change no state."""
    rates = parameters.setting("momentum")
    old = {
        name: rates[name] * state[parameters.named[name]]["momentum"]
        for name in rates
        if "momentum" in state[parameters.named[name]]
    }
    kept = parameters.pack(old)
    return {
        name: gradient + kept[name] if name in kept else gradient
        for name, gradient in gradients.items()
    }


def clipping(
    clip: KLClip,
    parameters: Parameters,
    directions: Mapping[str, Tensor],
    against: Mapping[str, Tensor],
) -> Tensor:
    """Return the factor ν that all directions are shortened by."""
    rates = parameters.setting("lr")
    if not directions:  # no parameter has a gradient
        return torch.ones(())
    products = {name: d * against[name] for name, d in directions.items()}
    parts = parameters.unpack(products)
    return clip.scale([(float(rates[name]), part.sum()) for name, part in parts.items()])


def move_(
    parameters: Parameters,
    state: State,
    directions: Mapping[str, Tensor],
    kept: Mapping[str, Tensor] | None,
    good: Tensor | None = None,
) -> None:
    """Move the parameters in place, θ ← θ − η (m + γ θ).

    Parameters
    ----------
    directions
        By parameter name; zero where the step is not good.
    kept
        Momenta of gradients to be remembered, by parameter name. If None, the momentum
        of directions is, m ← μ m + d.
    good
        Where the host has not looked yet, a boolean on the device: without it nothing
        moves.
    """
    names = {parameter: name for name, parameter in parameters.named.items()}
    for group in parameters.groups:
        here = [p for p in group["params"] if names[p] in directions]
        if not here:
            continue
        steps = tuple(directions[names[p]] for p in here)
        if kept is not None:
            for p in here:
                before = state[p].get("momentum", torch.zeros_like(p))
                state[p]["momentum"] = _own(_if(good, kept[names[p]], before))
        if kept is None and group["momentum"]:
            steps = _added_([state[p] for p in here], group["momentum"], steps, good)
        rate = float(group["lr"])
        if group["weight_decay"]:
            shrunk = _where(good, 1 - rate * group["weight_decay"], 1.0, here)
            torch._foreach_mul_(here, shrunk)
        if good is not None:
            steps = torch._foreach_mul(steps, _where(good, 1.0, 0.0, here))
        torch._foreach_add_(here, steps, alpha=-rate)


def _added_(
    states: Sequence[dict[str, Tensor]],
    momentum: float,
    steps: tuple[Tensor, ...],
    good: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return m ← μ m + d, in place; a step that is not good is 0 and changes nothing."""
    for state, step in zip(states, steps, strict=True):
        if "momentum" not in state:
            state["momentum"] = _own(torch.zeros_like(step))
    held = tuple(state["momentum"] for state in states)
    torch._foreach_mul_(held, _where(good, momentum, 1.0, held))
    torch._foreach_add_(held, steps)
    return held


def zero_unless(good: Tensor | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as they are, or zeros where a boolean on the device says no."""
    if good is None or not tensors:
        return dict(tensors)
    zero = next(iter(tensors.values())).new_zeros(())
    return {name: torch.where(good, each, zero) for name, each in tensors.items()}


def _if(good: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    return new if good is None else torch.where(good, new, old)


def _where(
    good: Tensor | None, then: float, otherwise: float, like: Sequence[Tensor]
) -> Any:
    """Return one number for all tensors, decided on the device where nobody has looked."""
    if good is None:
        return then
    widest = max((tensor.dtype for tensor in like), key=lambda dtype: dtype.itemsize)
    numbers = (good.new_full((), number, dtype=widest) for number in (then, otherwise))
    return torch.where(good, *numbers)


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def require_finite(
    step: int,
    directions: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    parameters: Parameters,
) -> None:
    """Name the block whose gradient or direction is not finite; one look at the device.

    Raises
    ------
    NumericalError
        With the step and the damping of the block's group.
    """
    if not directions:
        return
    names = list(directions)
    finite = torch.stack(torch._foreach_norm(list(directions.values()))).isfinite()
    known = {} if devices.postponing(finite) else gradients  # too large to be kept

    def complaint() -> NumericalError:
        name = names[finite.tolist().index(False)]
        wrong = name in known and not bool(known[name].isfinite().all())
        damping = parameters.setting("damping")
        first = next(n for n in parameters.blocks[name].parameters if n in damping)
        return NumericalError(
            f"step {step}: the {'gradient' if wrong else 'direction'} of block {name!r} "
            "holds NaN or infinity, or numbers whose squares overflow (damping "
            f"{damping[first]!r}). No parameter was changed."
        )

    devices.require_good(finite.all(), complaint)


def check_group(group: Mapping[str, Any], model: nn.Module, who: str) -> None:
    """Check the settings of a group, and that its parameters are the model's.

    Raises
    ------
    ValueError
        For settings out of range, foreign parameters, sparse gradients or half precision.
    """
    limits = {"lr": _INFINITY, "momentum": 1.0, "weight_decay": _INFINITY}
    found = {name: group[name] for name in limits if name in group}
    wrong = [n for n, v in found.items() if not is_number(v) or not 0 <= v < limits[n]]
    if wrong:
        shown = ", ".join(f"{name}={group[name]!r}" for name in wrong)
        msg = f"{who}: {shown}; finite numbers of at least 0, momentum below 1, expected."
        raise ValueError(msg)
    if "damping" in group:
        require_damping(group["damping"])
    own = {id(p) for p in model.parameters()}
    foreign = sum(id(p) not in own for p in group["params"])
    if foreign:
        raise ValueError(f"{who}: {foreign} of the parameters are not the model's.")
    modules = model.named_modules()
    sparse = [name for name, m in modules if getattr(m, "sparse", False) is True]
    if sparse:
        raise ValueError(
            f"{who}: {', '.join(sparse)} have sparse gradients, which no curvature is "
            "computed of; make them with sparse=False."
        )
    low = {str(p.dtype) for p in group["params"] if p.dtype in LOW_PRECISION}
    if low:
        raise ValueError(
            f"{who}: parameters in {', '.join(sorted(low))} were given; factorisations "
            "need float32 or float64."
        )


def check_schedule(
    statistics_every: int,
    inverse_every: int,
    burn_in: int,
    fraction: float,
    momentum_of: str,
) -> None:
    """Check how often and on what a `NaturalGradient` measures.

    Raises
    ------
    ValueError
        Naming what is expected.
    """
    if statistics_every < 1 or inverse_every < 1:
        raise ValueError(
            f"NaturalGradient: statistics_every={statistics_every}, "
            f"inverse_every={inverse_every}; positive numbers of steps are expected."
        )
    if burn_in < 0:
        raise ValueError(f"NaturalGradient: burn_in={burn_in}; at least 0 is expected.")
    if not 0 < fraction <= 1 or momentum_of not in ("direction", "gradient"):
        raise ValueError(
            f"NaturalGradient: statistics_fraction={fraction}, "
            f"momentum_of={momentum_of!r}; a fraction in (0, 1], and 'direction' or "
            "'gradient' are expected."
        )
