"""Models that went through torch.compile."""

from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile was given, or the model itself.

    Statistics watch layers through hooks, at which a compiled graph breaks; so they are
    taken from this module, whose parameters are the same and have their plain names.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(3, 2)
    >>> uncompiled(torch.compile(model, backend="eager")) is model
    True
    """
    found = getattr(model, "_orig_mod", model)
    return found if isinstance(found, nn.Module) else model
