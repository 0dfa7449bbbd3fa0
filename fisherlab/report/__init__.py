"""A report: what it is asked, the work, and the page it becomes.

From Python: `of_model` analyses a model, `write` makes the page of a result at hand,
`rebuild` that of a saved one, and `compare_runs` sets two saved ones side by side.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "compare_runs": "fisherlab.report.two_runs",
    "of_model": "fisherlab.report.job",
    "rebuild": "fisherlab.report.job",
    "write": "fisherlab.report.job",
}
__all__ = ["compare_runs", "of_model", "rebuild", "write"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: the command line parses without torch."""
    if name in _HOMES:
        # Kept under the name, which may be that of the module just imported too.
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fisherlab.report' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


if TYPE_CHECKING:  # the same names for type checkers and editors
    from fisherlab.report.job import of_model as of_model
    from fisherlab.report.job import rebuild as rebuild
    from fisherlab.report.job import write as write
    from fisherlab.report.two_runs import compare_runs as compare_runs
