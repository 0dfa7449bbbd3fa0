"""Which axis of a weight, as stored, runs over the outputs."""

import copy

import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FIRST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def output_axis(module: nn.Module, name: str) -> int:
    """Return 1 where the weight is stored (in, out), else 0.

    Modules of one's own that hold a weight (with a bias) and nothing else are tried: the
    gradient of one output for one row of numbers fills a row of F.linear's weight, and a
    column of that of ``x @ W``, which GPT-2's Conv1D has.

    Examples
    --------
    >>> [output_axis(m, "weight") for m in (nn.ConvTranspose1d(2, 3, 1), nn.Linear(2, 2))]
    [1, 0]
    """
    if isinstance(module, TRANSPOSED):
        return int(name == "weight")
    own = module._parameters
    alone = not module._modules and not module._buffers and set(own) <= {"weight", "bias"}
    weight = own.get(name)
    if name != "weight" or weight is None or weight.dim() != 2 or not alone:
        return 0
    known = isinstance(module, FIRST + RECURRENT) or weight.numel() < 2
    return 0 if known else _tried(module, weight)


def _tried(module: nn.Module, weight: Tensor) -> int:
    """Call a copy that shares nothing on one row, of either length."""
    for length in sorted(set(weight.shape)):
        grad = _gradient(module, weight, length)
        if grad is None:
            continue
        rows, columns = int(grad.any(1).sum()), int(grad.any(0).sum())
        if (rows, columns) in ((length, 1), (1, length)):
            return int(columns == 1 and weight.shape[0] == length)
    return 0


def _gradient(module: nn.Module, weight: Tensor, length: int) -> Tensor | None:
    """Return ∂y₀/∂W for a row of ones of this length, or None if it is not taken."""
    twin, small = copy.copy(module), 1 / weight.numel()
    cuda = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=cuda), torch.enable_grad():
        try:
            leaf = nn.Parameter(torch.full_like(weight, small))
            twin._parameters = {**module._parameters, "weight": leaf}
            out = type(module).forward(twin, weight.new_ones(1, length))
            (grad,) = torch.autograd.grad(out.flatten()[0], leaf)
        except Exception:  # any failure of somebody else's code: it takes other inputs
            return None
    return grad
