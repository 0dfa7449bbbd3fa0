"""Laws of the package: light to import, every public name there, documented."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import fisherlab as fl


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fisherlab_imports_nothing_heavy():
    heavy = ["torch", "numpy", "scipy", "xarray", "matplotlib", "seaborn", "sklearn"]
    code = f"import sys, fisherlab; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


def test_the_core_imports_neither_xarray_nor_figures():
    code = (
        "import sys, fisherlab as fl; fl.collect, fl.KPSVD, fl.metrics.frobenius_error; "
        "print([m for m in ('xarray', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize("name", [*fl._NAMES, *fl._MODULES])
def test_every_public_name_is_there(name):
    assert getattr(fl, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        fl.nothing


def test_names_of_the_second_level_work_and_are_not_shown():
    shown = set(dir(fl))
    assert fl.KBFGS is fl.approximators.KBFGS
    assert "KBFGS" not in shown
    assert len(shown - set(fl._MODULES)) <= 60
    assert set(fl.__all__) <= {*fl._NAMES, *fl._MODULES}


@pytest.mark.parametrize(
    "first", ["fl.approximators", "fl.KFAC", "fl.compare", "import fisherlab.approximators"]
)
def test_the_register_is_found_whatever_was_imported_before(first):
    code = f"import fisherlab as fl\n{first}\nprint(len(fl.approximators()) > 5)"
    code += "\nimport fisherlab.approximators as a\nprint(a.KFAC is fl.KFAC)"
    assert python(code).split() == ["True", "True"]


NAMED = [
    (name, getattr(importlib.import_module(home), name))
    for name, home in fl._NAMES.items()
    if home != "fisherlab.errors"
]
DESCRIBED = [(name, value) for name, value in NAMED if callable(value)]
FORMULA = re.compile(r":math:|\.\. math::|[=‖Σ⊗≈∝∈½]|⁻¹")
# What is no matrix and no number, but a choice, a place or a thing that words define.
IN_WORDS = {
    *("Auto", "ByInput", "ByOutput", "ByTile", "MethodByBlock", "Passes"),
    *("NetworkOperator", "Partition", "HeldOut", "LinearSteps", "LogarithmicSteps"),
}
UNFAILING = {
    *("approximators", "network_approximators", "preconditioners", "optimizers"),
    "frozen",
}


def of_rooms():
    """Yield the public functions and classes one level down, as fl.room.name."""
    rooms = {name: getattr(fl, name) for name in fl.__all__}
    for room, module in rooms.items():
        for name in dir(module) if inspect.ismodule(module) else ():
            value = getattr(module, name)
            own = str(getattr(value, "__module__", "")).startswith("fisherlab")
            public = own and not name.startswith("_")
            if public and (inspect.isclass(value) or inspect.isfunction(value)):
                yield f"{room}.{name}", value


def test_every_public_function_and_class_has_a_runnable_example():
    described = [*DESCRIBED, *of_rooms()]
    assert len(described) > 300
    assert not [n for n, value in described if ">>>" not in (inspect.getdoc(value) or "")]


def test_every_public_class_has_its_formula():
    bare = {
        name
        for name, value in DESCRIBED
        if inspect.isclass(value)
        and not FORMULA.search(inspect.getdoc(value).partition("Examples\n")[0])
    }
    assert bare == IN_WORDS


def test_every_public_name_says_what_it_refuses():
    """Functions, and classes whose construction raises."""

    def refuses(value):
        made = vars(value).get("__post_init__") if inspect.isclass(value) else None
        return inspect.isfunction(value) or (made and "raise " in inspect.getsource(made))

    silent = {
        name
        for name, value in DESCRIBED
        if refuses(value) and "Raises\n-" not in inspect.getdoc(value)
    }
    assert silent == UNFAILING


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """All of them one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {})
    assert "closest to the exact block" in capsys.readouterr().out
    plt.close("all")


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_that_the_plan_names_is_there(name):
    root = Path(__file__).parent.parent
    named = re.findall(r"`((?:fisherlab|tests)/[\w/.]*)`", (root / name).read_text())
    assert named
    assert not [path for path in named if not (root / path).exists()]


def _names_a_set(node: ast.expr, joined: bool = False) -> bool:
    if isinstance(node, ast.BinOp):
        return _names_a_set(node.left, True) or _names_a_set(node.right, True)
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    a_set = isinstance(node, ast.Set | ast.SetComp) or called in {"set", "frozenset"}
    return a_set or (joined and called.endswith(".keys"))


def test_no_set_gives_an_order_away():
    """Strings hash differently in every process: what goes through a set sorts it first."""
    ordered = ast.For | ast.ListComp | ast.DictComp | ast.GeneratorExp
    found = [
        f"{path.name}:{each.iter.lineno}"
        for path in sorted(Path(fl.__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ordered)
        for each in ([node] if isinstance(node, ast.For) else node.generators)
        if _names_a_set(each.iter)
    ]
    assert found == []
