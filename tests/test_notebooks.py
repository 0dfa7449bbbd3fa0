"""Committed notebooks were executed without errors, are small, and run again."""

import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

import fisherlab as fl

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes


def read(path: Path) -> Any:
    """Read a notebook by what is slow to import, so not where tests are collected."""
    return import_module("nbformat").read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_executed_and_small(path: Path) -> None:
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    numbers = [cell.execution_count for cell in code]
    assert numbers == list(range(1, len(code) + 1))
    assert path.stat().st_size < LARGEST
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_of_the_package_exist(path: Path) -> None:
    notebook = read(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    names = re.findall(r"\bfl((?:\.[A-Za-z]\w*)+)", "\n".join(code))
    assert names
    assert all(attrgetter(name[1:])(fl) is not None for name in names)


def _weighed(path: Path) -> object:
    marks = () if path.stem.startswith("02") else (pytest.mark.slow,)
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [_weighed(path) for path in NOTEBOOKS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_runs_again(path: Path, tmp_path: Path) -> None:
    notebook = read(path)
    for cell in notebook.cells:  # at quick size
        cell.source = re.sub(r"^EXAMPLES = \d+", "EXAMPLES = 60", cell.source, flags=re.M)
    before = [len(cell.get("outputs", [])) for cell in notebook.cells]
    import_module("nbclient").NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    after = [len(cell.get("outputs", [])) for cell in notebook.cells]
    assert [bool(n) for n in after] == [bool(n) for n in before]
