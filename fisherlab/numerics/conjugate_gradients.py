"""Preconditioned conjugate gradients for many right-hand sides at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """A value with how it was reached."""

    value: Tensor
    converged: bool
    iterations: int
    residual: float
    positive: bool = True


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
) -> Solution:
    """Solve M x = b for symmetric positive definite M and a stack of b.

    Parameters
    ----------
    product
        x ↦ M x on stacks of shape (k, ...).
    right
        Right-hand sides, shape (k, ...); each is solved to its own residual.
    precondition
        x ↦ P x with P ≈ M⁻¹ symmetric positive definite; identity if None.
    start
        First guess; zero if None.
    tolerance
        Relative residual ‖b − M x‖ / ‖b‖ at which a system is done.
    max_iterations
        Products spent at most.

    Returns
    -------
    Solution
        value, converged, iterations, the largest relative residual, and whether every
        direction met had positive curvature (if not, M is indefinite).

    Examples
    --------
    >>> b = torch.ones(1, 3, dtype=torch.float64)
    >>> round(float(conjugate_gradients(lambda x: 2 * x, b).value[0, 0]), 6)
    0.5
    """
    precondition = precondition or (lambda x: x)
    x = torch.zeros_like(right) if start is None else start.clone()
    residual = right - product(x) if start is not None else right.clone()
    scale = _norm(right).clamp_min(torch.finfo(right.dtype).tiny)
    z = precondition(residual)
    direction, energy = z.clone(), _dot(residual, z)
    used, rising = 0, torch.ones((), dtype=torch.bool, device=right.device)
    while True:
        active = _norm(residual) > tolerance * scale
        left, positive = torch.stack([active.any(), rising]).tolist()  # the only look
        if not left or not positive or used >= max_iterations:
            break
        image = product(direction)
        curvature = _dot(direction, image)
        rising = ((curvature > 0) | ~active).all()
        step = torch.where(active & rising, energy / curvature, 0)
        x += _scaled(direction, step)
        residual -= _scaled(image, step)
        z = precondition(residual)
        new = _dot(residual, z)
        ratio = torch.where(active, new / energy, 0)
        direction = z + _scaled(direction, ratio)
        energy, used = new, used + 1
    worst = float((_norm(residual) / scale).max()) if right.numel() else 0.0
    return Solution(x, worst <= tolerance, used - (not positive), worst, positive)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _norm(a: Tensor) -> Tensor:
    return a.flatten(1).norm(dim=1)


def _scaled(a: Tensor, factors: Tensor) -> Tensor:
    return a * factors.view(-1, *[1] * (a.dim() - 1))
