r"""Losses with the root of their output Fisher: the owners of all scaling.

A likelihood turns the network's output into a distribution. Its loss is the negative
log-likelihood of one example **summed** over its outputs. Its root holds columns s_v
with :math:`\sum_v s_v s_v^T = E_{y \sim p}[\nabla\ell \nabla\ell^T]` for each example.
"""

from abc import ABC, abstractmethod
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fisherlab.numerics import devices
from fisherlab.settings import setting


@runtime_checkable
class Likelihood(Protocol):
    """What the statistics need of a likelihood; any value with these methods is one.

    Losses are sums over the outputs of one example, axis 0 is the example, and the
    columns s_v of the root satisfy Σ_v s_v s_vᵀ = E_{y ~ p}[∇ℓ ∇ℓᵀ].

    Examples
    --------
    Counts with the rates exp(f):

    >>> class Poisson:
    ...     def check(self, output, target):
    ...         if target is not None and target.shape != output.shape:
    ...             raise ValueError("Poisson: y must have the shape of the output.")
    ...
    ...     def loss(self, output, target):
    ...         return (output.exp() - target * output).flatten(1).sum(1)
    ...
    ...     def gradient(self, output, target):
    ...         return output.exp() - target
    ...
    ...     def column_count(self, output):
    ...         return output[0].numel()
    ...
    ...     def root(self, output, target, part):
    ...         roots = torch.diag_embed((output.flatten(1) / 2).exp())
    ...         return roots.movedim(1, 0)[part].reshape(-1, *output.shape)
    ...
    ...     def uniforms_per_example(self, output):
    ...         return output[0].numel()
    ...
    ...     def sample(self, output, uniforms):
    ...         rate = output.exp()
    ...         counts = torch.arange(99).to(rate)
    ...         logs = counts * output[..., None] - torch.lgamma(counts + 1)
    ...         below = (logs - rate[..., None]).exp().cumsum(-1)
    ...         return (uniforms.view(*rate.shape, 1) > below).sum(-1).to(rate)
    ...
    ...     def mask(self, output, target):
    ...         return None
    >>> import fisherlab as fl
    >>> data = torch.ones(5, 3), torch.ones(5, 2)
    >>> stats = fl.collect(torch.nn.Linear(3, 2), data, Poisson())
    >>> stats["weight"].gradients.shape
    torch.Size([2, 5, 1, 2])
    """

    def check(self, output: Tensor, target: Tensor | None) -> None:
        """Raise ValueError if the target does not fit the output."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each example, summed over its outputs."""

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ∂loss/∂output, shaped like the output."""

    def column_count(self, output: Tensor) -> int:
        """Return the number of columns of the root."""

    def root(self, output: Tensor, target: Tensor | None, part: slice) -> Tensor:
        """Return some columns of the root, shape ``(v, *output.shape)``."""

    def uniforms_per_example(self, output: Tensor) -> int:
        """Return how many uniform numbers one sampled label takes."""

    def sample(self, output: Tensor, uniforms: Float[Tensor, "n u"]) -> Tensor:
        """Return labels drawn from the model by inverse transform of uniforms."""

    def mask(self, output: Tensor, target: Tensor | None) -> Tensor | None:
        """Return 0/1 weights of the outputs that count, or None if all do."""


def lacks(likelihood: object) -> list[str]:
    """Return the methods that a value lacks to be a likelihood.

    Examples
    --------
    >>> lacks(Gaussian()), lacks("gaussian")[:2]
    ([], ['check', 'loss'])
    """
    needed = [name for name in vars(Likelihood) if not name.startswith("_")]
    return [name for name in needed if not callable(getattr(likelihood, name, None))]


def _need(target: Tensor | None, likelihood: str) -> Tensor:
    if target is None:
        raise ValueError(f"{likelihood}: labels are needed for the loss, but y is None.")
    return target


@final
@setting
class Categorical:
    r"""Classes in one axis of the logits, cross-entropy summed over the others.

    .. math:: ℓ = -\sum_t \log p_{t, y_t}, \qquad p_t = \mathrm{softmax}(f_t), \qquad
        H_t = \mathrm{diag}(p_t) - p_t p_t^T

    Parameters
    ----------
    ignore_index
        Labels with this value drop their position from loss and Fisher.
    class_axis
        Axis of the output that holds the classes: 1 in the convention of torch's
        `cross_entropy`, (N, C, H, W). The last one by default, also without
        labels; where an output of three or more axes and its labels allow axis 1 as
        well, it must be said.

    Raises
    ------
    ValueError
        For ``class_axis=0``, which is the example; and when called, for outputs and labels
        that do not fit.

    Notes
    -----
    The root is diag(√p) − p√pᵀ, reflected so that its first column vanishes: C − 1
    columns per position, without the cancellation of a Cholesky factor.

    Examples
    --------
    >>> Categorical().loss(torch.zeros(1, 4), torch.tensor([2]))
    tensor([1.3863])
    >>> labels = torch.zeros(1, 5, dtype=torch.long)
    >>> Categorical(class_axis=1).loss(torch.zeros(1, 4, 5), labels)
    tensor([6.9315])
    """

    ignore_index: int = -100
    class_axis: int | None = None

    def __post_init__(self) -> None:
        """Check the axis."""
        if self.class_axis == 0:
            msg = "Categorical(class_axis=0): axis 0 is the example; give another one."
            raise ValueError(msg)

    def _axis(self, output: Tensor) -> int:
        """Return the axis of the classes, counted from the end."""
        axis = -1 if self.class_axis is None else self.class_axis
        return axis if axis < 0 else axis - output.dim()

    def check(self, output: Tensor, target: Tensor | None) -> None:
        """Raise ValueError unless y holds class numbers for every position.

        And unless the axis of the classes is said, where shapes leave it open.
        """
        shape, axis = tuple(output.shape), self._axis(output)
        if output.dim() < 2 or not -output.dim() < axis < 0:
            where = "" if self.class_axis is None else f" with class_axis={self.class_axis}"
            raise ValueError(
                f"Categorical: the output has shape {shape}; (N, ..., classes) is "
                f"expected{where}."
            )
        if shape[axis] < 2:
            raise ValueError(
                f"Categorical: the output of shape {shape} has one class, whose "
                "probability is always 1. Give it a logit for every class, or use "
                "Bernoulli() for a single logit."
            )
        positions = _without(shape, axis)
        _require_numbers(output, "Categorical")
        self._require_axis(shape, target)
        if target is None:
            return
        integers = not (target.is_floating_point() or target.dtype == torch.bool)
        if not integers or target.shape != positions:
            raise ValueError(
                f"Categorical: labels of shape {tuple(target.shape)} and dtype "
                f"{target.dtype} were given for an output of shape {shape}; integers of "
                f"shape {positions} are expected. Classes in another axis than the last "
                "are said by class_axis."
            )
        if not target.numel():
            return
        classes = shape[axis]
        least, most = torch.where(target == self.ignore_index, 0, target).aminmax()
        devices.require_good(
            (least >= 0) & (most < classes),
            lambda: ValueError(
                f"Categorical: labels run from {int(least)} to {int(most)}, "
                f"but the output has {classes} classes (0 to {classes - 1})."
            ),
        )

    def _require_axis(self, shape: tuple[int, ...], target: Tensor | None) -> None:
        """Refuse to guess between (N, ..., C) and torch's (N, C, ...)."""
        if self.class_axis is not None or len(shape) < 3:
            return
        fitting = {_without(shape, 1), _without(shape, -1)}
        if target is not None and fitting == {tuple(target.shape)}:
            raise ValueError(
                f"Categorical: an output of shape {shape} and labels "
                f"{tuple(target.shape)} leave open which axis holds the classes. Say "
                "Categorical(class_axis=-1) for the last one, or class_axis=1 for torch's "
                "(N, C, ...)."
            )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return −Σ log p(y), shape (N,)."""
        axis = self._axis(output)
        used, index = self._chosen(output, target)
        chosen = output.log_softmax(axis).gather(axis, index).squeeze(axis)
        return -(chosen * used).flatten(1).sum(1) if chosen.dim() > 1 else -chosen * used

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return p − onehot(y), zero where ignored."""
        target = _need(target, "Categorical")
        axis = self._axis(output)
        used, index = self._chosen(output, target)
        out = output.softmax(axis)
        out = out.scatter_add(axis, index, torch.full_like(out.narrow(axis, 0, 1), -1.0))
        return out * used.unsqueeze(axis)

    def _chosen(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return which positions are used, and their classes along the axis of these."""
        axis = self._axis(output)
        used = target != self.ignore_index
        index = torch.where(used, target, 0).long()
        if devices.postponing(index):  # a wrong label may end the process before its look
            index = index.clamp(0, output.shape[axis] - 1)
        return used, index.unsqueeze(axis)

    def column_count(self, output: Tensor) -> int:
        """Return positions · (classes − 1)."""
        return self.uniforms_per_example(output) * (output.shape[self._axis(output)] - 1)

    def root(self, output: Tensor, target: Tensor | None, part: slice) -> Tensor:
        """Return columns s_c = √p_c (e_c − (p + √p₀ e₀) / (1 + √p₀)), 0 < c < C.

        They are those of (diag(√p) − p√pᵀ) H, H the reflection of √p onto −e₀.
        """
        axis = self._axis(output)
        mask, output = self.mask(output, target), output.movedim(axis, -1)
        n, classes = output.shape[0], output.shape[-1]
        numbers = torch.arange(part.start, part.stop, device=output.device)
        position, column = numbers // (classes - 1), numbers % (classes - 1) + 1
        here = torch.arange(len(numbers), device=output.device)
        out = output.new_zeros(len(numbers), n, *output.reshape(n, -1, classes).shape[1:])
        first = part.start // (classes - 1)
        used = slice(first, (part.stop - 1) // (classes - 1) + 1)
        root, beside, own = self._terms(output.reshape(n, -1, classes)[:, used])
        there = position - first
        scale = root[:, there, column].T
        out[here, :, position] = -scale[..., None] * beside.transpose(0, 1)[there]
        out[here, :, position, column] = scale * own[:, there, column].T
        return _masked(out.view(-1, *output.shape).movedim(-1, axis), mask)

    def _terms(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return √p, (p + √p₀ e₀) / (1 + √p₀), and 1 less that without cancellation."""
        p = logits.softmax(-1)
        root = p.sqrt()
        first = root[..., :1]
        beside = p.clone()
        beside[..., :1] += first
        others = _sums_before(p) + _sums_before(p.flip(-1)).flip(-1)
        return root, beside / (1 + first), (first + others) / (1 + first)

    def uniforms_per_example(self, output: Tensor) -> int:
        """Return one per position."""
        return output[0].numel() // output.shape[self._axis(output)]

    def sample(self, output: Tensor, uniforms: Float[Tensor, "n u"]) -> Tensor:
        """Return classes by inverse transform."""
        output = output.movedim(self._axis(output), -1)
        edges = output.double().softmax(-1).cumsum(-1)
        points = uniforms.view(*output.shape[:-1], 1).double() * edges[..., -1:]
        return (points >= edges[..., :-1]).sum(-1)

    def mask(self, output: Tensor, target: Tensor | None) -> Tensor | None:
        """Return zeros at ignored positions."""
        if target is None or not bool((target == self.ignore_index).any()):
            return None
        used = (target != self.ignore_index).to(output.dtype)
        return used.unsqueeze(self._axis(output))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Return a shape with one axis less."""
    kept = list(shape)
    del kept[axis]
    return tuple(kept)


def _sums_before(p: Tensor) -> Tensor:
    """Return Σ_{j<c} p_j at every c of the last axis."""
    return F.pad(p, (1, 0))[..., :-1].cumsum(-1)


class _OfOutputs(ABC):
    """Independent real outputs; a label that is NaN drops its own."""

    @abstractmethod
    def _deviation(self, output: Tensor) -> Tensor:
        """Return the root of the Fisher of every output."""

    def column_count(self, output: Tensor) -> int:
        """Return the number of outputs."""
        return output[0].numel()

    def uniforms_per_example(self, output: Tensor) -> int:
        """Return one per output."""
        return output[0].numel()

    def root(self, output: Tensor, target: Tensor | None, part: slice) -> Tensor:
        """Return columns of one output each."""
        deviation = self._deviation(output)
        return _unit_columns(_masked(deviation, self.mask(output, target)), part)

    def mask(self, output: Tensor, target: Tensor | None) -> Tensor | None:
        """Return zeros where the label is NaN."""
        if target is None or not target.is_floating_point():
            return None
        missing = target.isnan()
        return (~missing).to(output.dtype) if bool(missing.any()) else None


@final
@setting
class Bernoulli(_OfOutputs):
    r"""Independent logits with labels in [0, 1], cross-entropy summed over outputs.

    .. math:: ℓ = -\sum_o y_o \log σ(f_o) + (1 - y_o) \log(1 - σ(f_o)), \qquad
        H = \mathrm{diag}(σ(f) (1 - σ(f)))

    Labels that are NaN drop their output from loss and Fisher.

    Examples
    --------
    >>> Bernoulli().loss(torch.zeros(1, 3), torch.ones(1, 3))
    tensor([2.0794])
    """

    def check(self, output: Tensor, target: Tensor | None) -> None:
        """Raise ValueError unless y lies in [0, 1] and has the output's shape."""
        _check_real(output, target, "Bernoulli")
        if target is None or not target.numel():
            return
        least, most = _real(target).aminmax()
        devices.require_good(
            (least >= 0) & (most <= 1),
            lambda: ValueError(
                f"Bernoulli: labels run from {float(least):g} to "
                f"{float(most):g}; numbers in [0, 1] are expected."
            ),
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return Σ softplus(z) − y z, shape (N,)."""
        known = torch.nan_to_num(target.to(output.dtype))
        each = torch.nn.functional.softplus(output) - known * output
        return _sum_known(each, target)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return q − y."""
        target = _need(target, "Bernoulli").to(output.dtype)
        return _masked(output.sigmoid() - target.nan_to_num(), self.mask(output, target))

    def _deviation(self, output: Tensor) -> Tensor:
        """Return √(q(1 − q))."""
        return (output.sigmoid() * (-output).sigmoid()).sqrt()

    def sample(self, output: Tensor, uniforms: Float[Tensor, "n u"]) -> Tensor:
        """Return 1 where u < q."""
        return (uniforms.view(output.shape) < output.double().sigmoid()).to(output.dtype)


@final
@setting
class Gaussian(_OfOutputs):
    """Real outputs with a fixed variance: loss ‖y − f‖² / (2 variance).

    Labels that are NaN drop their output from loss and Fisher.

    Parameters
    ----------
    variance
        σ², the same for every output.

    Raises
    ------
    ValueError
        For a variance that is not positive.

    Examples
    --------
    >>> Gaussian(variance=2.0).loss(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([0.5000])
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        """Check the variance."""
        if getattr(self.variance, "ndim", 0) or not 0 < self.variance < float("inf"):
            msg = f"Gaussian(variance={self.variance}): one positive number is expected."
            raise ValueError(msg)

    def check(self, output: Tensor, target: Tensor | None) -> None:
        """Raise ValueError unless y is real, not infinite, and has the output's shape."""
        _check_real(output, target, "Gaussian")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ‖y − f‖² / (2σ²), shape (N,)."""
        each = (output - target.to(output.dtype).nan_to_num()).square()
        return _sum_known(each, target) / (2 * self.variance)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return (f − y) / σ²."""
        target = _need(target, "Gaussian").to(output.dtype)
        difference = (output - target.nan_to_num()) / self.variance
        return _masked(difference, self.mask(output, target))

    def _deviation(self, output: Tensor) -> Tensor:
        """Return 1 / σ."""
        return torch.full_like(output, self.variance**-0.5)

    def sample(self, output: Tensor, uniforms: Float[Tensor, "n u"]) -> Tensor:
        """Return f + σ Φ⁻¹(u)."""
        inside = uniforms.view(output.shape).clamp(2.0**-54, 1 - 2.0**-53)
        noise = torch.special.ndtri(inside.double()) * self.variance**0.5
        return output + noise.to(output.dtype)


def _require_numbers(output: Tensor, name: str) -> None:
    """Refuse examples without a single output: sequences of length zero."""
    if len(output) and not output.numel():
        raise ValueError(
            f"{name}: an output of shape {tuple(output.shape)} holds no number; leave "
            "empty sequences out of the data."
        )


def _check_real(output: Tensor, target: Tensor | None, name: str) -> None:
    _require_numbers(output, name)
    if target is None:
        return
    if target.shape != output.shape:
        raise ValueError(
            f"{name}: labels of shape {tuple(target.shape)} were given for an output "
            f"of shape {tuple(output.shape)}; the two must be equal."
        )
    infinite, numbers, dtype = target.isinf().sum(), target.numel(), target.dtype

    def complaint() -> ValueError:
        return ValueError(
            f"{name}: labels must be finite real numbers (NaN where one is missing); "
            f"{int(infinite)} of {numbers} are infinite, dtype {dtype}."
        )

    if target.is_complex():
        raise complaint()
    devices.require_good(infinite == 0, complaint)


def _real(target: Tensor) -> Tensor:
    """Return labels with 0 for those that are missing."""
    return target.nan_to_num(0.0) if target.is_floating_point() else target


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


def _sum_known(each: Tensor, target: Tensor) -> Tensor:
    """Return sums over the outputs whose label is not missing."""
    if target.is_floating_point():
        each = torch.where(target.isnan(), 0, each)
    return each.flatten(1).sum(1) if each.dim() > 1 else each


def _unit_columns(deviation: Tensor, part: slice) -> Tensor:
    """Return columns that hold one output's deviation each, shape (v, *output.shape)."""
    flat = deviation.reshape(deviation.shape[0], -1)
    numbers = torch.arange(part.start, part.stop, device=deviation.device)
    out = flat.new_zeros(len(numbers), *flat.shape)
    out[torch.arange(len(numbers), device=deviation.device), :, numbers] = flat[
        :, numbers
    ].T
    return out.view(-1, *deviation.shape)
