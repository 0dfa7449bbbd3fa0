"""Values as plain containers of tensors, which may be loaded without trusting a file."""

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

_PLAIN: Final = (str, int, float, bool, type(None), Tensor, torch.dtype, torch.device)
_KIND: Final = "__kind__"
# Where a class of older checkpoints is whose name another one beside it has as well.
_MOVED: Final = {"fisherlab.operators.mode_products": "fisherlab.operators.gradient_roots"}


def pack(value: Any, where: str = "state") -> Any:
    """Turn a value into dicts, lists, tuples, numbers, strings and tensors.

    Dataclasses (operators, statistics, provenance) become dicts that name their class.
    What they have computed and kept is left out; it is computed again on demand.

    Parameters
    ----------
    value
        What is to be packed.
    where
        How the value is called in an error.

    Raises
    ------
    TypeError
        For anything else; its place is named.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> packed = pack({"fc1": Diagonal(torch.ones(2, 2))})
    >>> packed["fc1"]["__kind__"]
    'fisherlab.operators.eigenform:Diagonal'
    """
    if isinstance(value, _PLAIN) and not isinstance(value, np.generic):
        return value
    if isinstance(value, Mapping):
        return {key: pack(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        parts = [pack(item, f"{where}[{k}]") for k, item in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, np.generic):
        return value.item()
    return _labelled(value, where)


def _labelled(value: Any, where: str) -> dict[str, Any]:
    """Turn what is neither plain nor a container into a dict that names its kind."""
    if isinstance(value, slice):
        return {_KIND: "slice", "fields": (value.start, value.stop, value.step)}
    if isinstance(value, (set, frozenset)):
        return {_KIND: type(value).__name__, "fields": sorted(value)}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        content = {f.name: getattr(value, f.name) for f in fields(value)}
        return {
            _KIND: f"{kind.__module__}:{kind.__qualname__}",
            "fields": pack(content, f"{where}: {kind.__name__}"),
        }
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold. Numbers, "
        "strings, tensors, dataclasses, and dicts, lists, tuples and sets of them are "
        "expected."
    )


def unpack(value: Any) -> Any:
    """Undo `pack`.

    Only dataclasses of modules that are loaded already are made, and none of their code
    is run, so that a file from elsewhere can do no harm.

    Raises
    ------
    ValueError
        If a class is unknown, or its fields are others.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> unpack(pack((1, Diagonal(torch.ones(2, 2)))))[1].trace()
    4.0
    """
    if isinstance(value, dict):
        if _KIND in value:
            return _made(value[_KIND], value.get("fields"))
        return {key: unpack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(unpack(item) for item in value)
    return value


def moved(value: Any, device: torch.device) -> Any:
    """Return a value whose tensors are on a device; what it kept is computed again.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> moved(Diagonal(torch.ones(2, 2)), torch.device("meta")).device
    device(type='meta')
    """
    return unpack(_placed(pack(value), device))


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if value.is_meta and device.type != "meta":
            raise ValueError(
                "load_state_dict: the tensors of the state are on the device 'meta' and "
                "hold no data; load the file with map_location='cpu'."
            )
        return value.to(device)
    if isinstance(value, dict):
        return {key: _placed(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(item, device) for item in value)
    return value


def lasting(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what a copy of an optimiser of ours takes along, as torch's own do.

    Hooks and the ``step`` that a scheduler wraps around the original are left behind:
    they would move the original.
    """
    of_torch = torch.optim.Optimizer([torch.empty(1)], {}).__dict__.keys()
    kept = {"defaults", "state", "param_groups"}
    left = {"step", "_opt_called", *of_torch} - kept
    return {name: part for name, part in optimizer.__dict__.items() if name not in left}


_BUILTIN: Final[dict[str, Callable[[Any], Any]]] = {
    "slice": lambda parts: slice(*parts),
    "set": set,
    "frozenset": frozenset,
}


def _made(kind: object, content: Any) -> Any:
    if isinstance(kind, str) and kind in _BUILTIN:
        try:
            return _BUILTIN[kind](content)
        except TypeError as error:
            raise ValueError(f"The checkpoint holds no {kind}: {error}.") from error
    found = _class_called(str(kind))
    names = {field.name for field in fields(found)}
    given = content.keys() if isinstance(content, Mapping) else {"no mapping"}
    # A field that is new since then has its default, which the class holds.
    unlike = (given - names) | {name for name in names - given if not hasattr(found, name)}
    if unlike:
        raise ValueError(
            f"The checkpoint holds a {kind} with other fields than this version has: "
            f"{', '.join(sorted(map(str, unlike)))}."
        )
    value = object.__new__(found)
    for field, item in content.items():
        object.__setattr__(value, field, unpack(item))
    return value


def _class_called(kind: str) -> Any:
    """Return the dataclass of this name; of ours, it may stand in another file by now."""
    module, _, name = kind.partition(":")
    module = _MOVED.get(module, module)
    package, places = ".".join(module.split(".")[:2]), [module]
    if module.startswith("fisherlab."):
        for known in (package, module):
            with suppress(ImportError):
                importlib.import_module(known)
        places += sorted(m for m in sys.modules if f"{m}.".startswith(f"{package}."))
    for place in places:
        found: Any = sys.modules.get(place)
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and is_dataclass(found):
            return found
    raise ValueError(
        f"The checkpoint holds a {kind}, which is not a dataclass of a loaded "
        "module. Import the module that defines it first."
    )
