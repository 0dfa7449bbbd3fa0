"""Modules that couple or randomise examples, and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fisherlab.errors import UnsupportedModelError


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode, and every module back into its own mode afterwards.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with frozen(model):
    ...     model[1].training
    False
    >>> model[1].training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def require_independent_examples(model: nn.Module) -> None:
    """Refuse modules that couple examples or draw random numbers.

    Raises
    ------
    UnsupportedModelError
        Naming the modules and the remedy.
    """
    coupled = [name for name, m in model.named_modules() if _couples(m)]
    if coupled:
        raise UnsupportedModelError(
            f"Batch statistics couple the examples in {_names(coupled)}, so they have "
            "no per-example gradients. Use `with fisherlab.frozen(model):` (eval mode); "
            "track_running_stats must be on."
        )
    random = [name for name, m in model.named_modules() if _randomises(m)]
    if random:
        raise UnsupportedModelError(
            f"Dropout is active in {_names(random)}, so the Fisher would be random. "
            "Use `with fisherlab.frozen(model):` (eval mode)."
        )


def _couples(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (
        module.training or module.running_mean is None
    )


def _randomises(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RReLU):
        return module.lower < module.upper
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0


def _names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
