"""Tell how good each approximation of a network's Fisher matrix is, and what it costs.

What a user begins with is here, the rest a level down, such as `fisherlab.operators`; the
stub beside this file says which name lives where.

>>> import fisherlab as fl
>>> sorted(name for name in dir(fl) if name.startswith("KFAC"))
['KFAC', 'KFACCorrected', 'KFACTridiagonal']
"""

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_LINES = [line for line in _STUB.body if isinstance(line, ast.ImportFrom)]
_MODULES = [
    "approximators",  # a callable module: its call is the register
    *(name.name for line in _LINES if line.module == "fisherlab" for name in line.names),
]
_NAMES = {
    name.name: str(line.module)
    for line in _LINES
    if line.module != "fisherlab"
    for name in line.names
}

__all__ = [*ast.literal_eval(_STUB.body[-1].value), *_MODULES]  # noqa: PLE0604 - unpacked


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"fisherlab.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    msg = f"module 'fisherlab' has no attribute {name!r}"
    raise AttributeError(msg, name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    """List what a user begins with."""
    return sorted(__all__)
