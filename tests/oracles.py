"""Definitions written out plainly, in code paths that fisherlab does not use.

Scores come from jacrev and enumerated labels, sums from einsum over formed matrices,
factors from loops, rearrangements from numpy.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.nn import functional as F

from fisherlab.likelihoods import Bernoulli, Categorical, Gaussian


def assert_close(actual, expected, rtol=1e-10, atol=0.0):
    """Compare entry by entry, relative to the largest entry expected.

    The message names the worst entry, both values and their ratio: a ratio of 2 or of N
    tells which factor is missing.
    """
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if not expected.numel():
        return
    assert torch.isfinite(actual).all(), "not finite"
    difference = (actual - expected).abs()
    limit = atol + rtol * float(expected.abs().max())
    worst = int(difference.argmax())
    if float(difference.flatten()[worst]) > limit:
        index = tuple(
            int(i) for i in np.unravel_index(worst, tuple(expected.shape) or (1,))
        )
        got, wanted = float(actual.flatten()[worst]), float(expected.flatten()[worst])
        ratio = got / wanted if wanted else float("inf")
        raise AssertionError(
            f"at {index}: {got!r} is not {wanted!r} (ratio {ratio:.12g}, difference "
            f"{got - wanted:.3g}, allowed {limit:.3g})"
        )


def as_weight(tensors, weight, bias, norm=False):
    """Lay parameter tensors (..., *shape) out as (..., rows, columns), bias last."""
    w = tensors[weight]
    lead = w.shape[: w.dim() - weight_dims(tensors, weight)]
    rows = w.shape[len(lead) :].numel() if norm else w.shape[len(lead)]
    parts = [w.reshape(*lead, rows, -1)]
    if bias is not None:
        parts.append(tensors[bias].reshape(*lead, rows, 1))
    return torch.cat(parts, -1)


def weight_dims(tensors, weight):
    return tensors.get("__dims__", {}).get(weight, tensors[weight].dim())


def jacobian(model, x, block):
    """Return dz/dvec(w) of one example, (outputs, p), by jacrev of the whole model."""
    held = {name: p.detach() for name, p in model.named_parameters()}
    held |= {name: b.detach() for name, b in model.named_buffers()}
    names = (block.weight,) if block.bias is None else (block.weight, block.bias)

    def outputs(chosen):
        return torch.func.functional_call(model, {**held, **chosen}, (x[None],)).flatten()

    found = dict(torch.func.jacrev(outputs)({name: held[name] for name in names}))
    found["__dims__"] = {name: held[name].dim() for name in names}
    w = as_weight(found, block.weight, block.bias, norm=block.rows != block.shape[0])
    return w.flatten(1)


def outcomes(likelihood, output):
    """Enumerate (label, probability) of one example's output (..., C)."""
    if isinstance(likelihood, Categorical):
        p = output.reshape(-1, output.shape[-1]).softmax(-1)
        for label in itertools.product(range(p.shape[1]), repeat=p.shape[0]):
            y = torch.tensor(label)
            yield y, p[torch.arange(len(label)), y].prod()
        return
    q = output.flatten().sigmoid()
    for bits in itertools.product((0.0, 1.0), repeat=len(q)):
        y = torch.tensor(bits, dtype=q.dtype)
        yield y, (q * y + (1 - q) * (1 - y)).prod()


def loss(likelihood, output, y):
    """Return the loss of one example by torch's own losses, summed over its outputs."""
    if isinstance(likelihood, Categorical):
        return F.cross_entropy(
            output.reshape(-1, output.shape[-1]),
            y.reshape(-1),
            reduction="sum",
            ignore_index=likelihood.ignore_index,
        )
    z, y = output.flatten(), y.flatten()
    if isinstance(likelihood, Bernoulli):
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    assert isinstance(likelihood, Gaussian)
    return F.mse_loss(z, y, reduction="sum") / (2 * likelihood.variance)


def output_gradient(likelihood, output, y):
    """Return ∂loss/∂output of one example by autograd."""
    z = output.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(likelihood, z, y), z)
    return gradient.flatten()


def output_fisher(likelihood, output):
    """Return E[∇ℓ ∇ℓᵀ] of one example over all labels (Gaussian: I/σ²)."""
    size = output.numel()
    if isinstance(likelihood, Gaussian):
        return torch.eye(size, dtype=output.dtype) / likelihood.variance
    total = torch.zeros(size, size, dtype=output.dtype)
    for y, probability in outcomes(likelihood, output):
        g = output_gradient(likelihood, output, y)
        total += probability * torch.outer(g, g)
    return total


def brute_force_fisher(model, x, likelihood, block):
    """Return (1/N) Σ_n J_nᵀ E[∇ℓ ∇ℓᵀ] J_n, labels enumerated."""
    total = torch.zeros(())
    for example in x:
        j = jacobian(model, example, block)
        total = (
            total + j.T @ output_fisher(likelihood, model(example[None])[0].detach()) @ j
        )
    return total / len(x)


def example_scores(model, x, y, likelihood, block):
    """Return the gradient of each example's loss, (N, p)."""
    rows = []
    for example, label in zip(x, y, strict=True):
        g = output_gradient(likelihood, model(example[None])[0].detach(), label)
        rows.append(g @ jacobian(model, example, block))
    return torch.stack(rows)


def second_moment_block(matrices, count):
    """Return (1/count) Σ vec(D) vec(D)ᵀ from formed D (v, n, o, i)."""
    flat = matrices.double().flatten(2)
    return torch.einsum("vnp,vnq->pq", flat, flat) / count


def rearranged(dense, weight_shape):
    """Return Van Loan's rearrangement, rows (o, o'), columns (i, i')."""
    o, i = weight_shape
    blocks = np.asarray(dense, dtype=np.float64).reshape(o, i, o, i)
    return blocks.transpose(0, 2, 1, 3).reshape(o * o, i * i)


def best_sum(dense, weight_shape, rank):
    """Return the best sum of `rank` Kronecker products of a dense block, dense."""
    o, i = weight_shape
    u, s, vt = np.linalg.svd(rearranged(dense, weight_shape))
    total = np.zeros((o * i, o * i))
    for k in range(min(rank, len(s))):
        total += s[k] * np.kron(u[:, k].reshape(o, o), vt[k].reshape(i, i))
    return torch.from_numpy(total)


def kfac(inputs, gradients, count, positions):
    """Return G and A of KFAC-expand by loops over columns, examples and positions."""
    v, n, t, o = gradients.shape
    rows = np.zeros((o, o))
    cols = np.zeros((inputs.shape[2], inputs.shape[2]))
    for example, place in itertools.product(range(n), range(t)):
        a = inputs[example, place].numpy()
        cols += np.outer(a, a) / count
        for column in range(v):
            g = gradients[column, example, place].numpy()
            rows += np.outer(g, g) / positions
    return torch.from_numpy(rows), torch.from_numpy(cols)


def mini_blocks(dense, groups):
    """Keep the entries of a dense block whose row and column share a group."""
    label = torch.empty(dense.shape[0], dtype=torch.long)
    for number, group in enumerate(groups):
        label[torch.as_tensor(group)] = number
    return torch.where(label[:, None] == label[None, :], dense, 0.0)


def damped_inverse(dense, damping):
    return torch.linalg.inv(dense + damping * torch.eye(len(dense), dtype=dense.dtype))
