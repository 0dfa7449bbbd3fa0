"""The parts of the site that are read off the package and the results."""

import ast
import copy
import importlib
import inspect
import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import xarray as xr

import fisherlab as fl
from fisherlab.analysis.cost import Probed
from fisherlab.analysis.estimates import shares
from fisherlab.numerics.devices import readable

ROOT = Path(__file__).parent.parent
FAMILIES = {  # titles of the modules of fisherlab/approximators
    "exact": "Exact and low-rank",
    "mini_block": "Block-diagonal and diagonal",
    "kfac": "One Kronecker product: K-FAC",
    "kfac_variants": "Variants of K-FAC",
    "kronecker": "Other Kronecker products",
    "kpsvd": "Sums of Kronecker products",
    "network": "Across layers",
    "online": "Online",
    "mean_gradients": "From the gradient of the mean loss",
}


def write(folder: Path) -> None:
    """Write all generated pages."""
    for name in ("tutorials", "methods", "reference"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copyfile(notebook, folder / "tutorials" / notebook.name)
    for module in fl._MODULES:
        reference(module, folder / "reference")
    methods(folder / "methods")
    (folder / "benchmarks.md").write_text(benchmarks(), encoding="utf-8")
    (folder / "verdict.md").write_text(verdict(), encoding="utf-8")


def heading(text: str, line: str = "=") -> str:
    """Return a heading of reStructuredText."""
    return f"{text}\n{line * len(text)}\n\n"


def public_names(module: str) -> list[str]:
    """Return what a module exports by importing it under its own name."""
    source = ROOT / "fisherlab" / module.replace(".", "/")
    file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    made = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    imported = [
        alias.name
        for line in tree.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
        if alias.asname == alias.name
    ]
    told = getattr(importlib.import_module(f"fisherlab.{module}"), "__all__", None)
    names = {name for name in told or (*made, *imported) if not name.startswith("_")}
    return sorted(names, key=str.lower)


def summary(value: object) -> str:
    """Return the first sentence of a docstring."""
    return plain(" ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()))


def plain(line: str) -> str:
    """Keep the bars of a line beside code and formulas."""
    if line.lstrip().startswith((">>>", "...")) or "\\" in line.replace("`", ""):
        return line
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if "`" in part else part.replace("|", r"\|") for part in parts)


def reference(module: str, folder: Path) -> None:
    """Write a page a name, and one that lists them."""
    home = importlib.import_module(f"fisherlab.{module}")
    listed = ".. list-table::\n   :widths: 35 65\n\n"
    tree = ".. toctree::\n   :hidden:\n\n"
    for name in public_names(module):
        value, first = getattr(home, name), fl._NAMES.get(name)
        elsewhere = first not in {None, home.__name__} and value is getattr(fl, name)
        if elsewhere or inspect.ismodule(value) or not callable(value):
            continue
        path = f"fl.{name}" if first == home.__name__ else f"fl.{module}.{name}"
        kind = "class" if inspect.isclass(value) else "function"
        directive = f".. auto{kind}:: {path.replace('fl', 'fisherlab', 1)}\n"
        members = "   :members:\n" if kind == "class" else ""
        page = folder / f"{module}.{name}.rst"
        page.write_text(heading(path) + directive + members, encoding="utf-8")
        listed += f"   * - :doc:`{path} <{page.stem}>`\n     - {summary(value)}\n"
        tree += f"   {page.stem}\n"
    text = heading(f"fl.{module}") + f"{inspect.getdoc(home)}\n\n{listed}\n{tree}"
    (folder / f"{module}.rst").write_text(text, encoding="utf-8")


def trained() -> tuple[fl.problems.Problem, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the digits' network after 50 steps, with 200 examples and 20 others."""
    problem = fl.problems.load("digits")
    fl.follow(problem, "sgd-momentum", steps=50, every=50)
    x, y = problem.train
    return problem, [(x[:200], y[:200]), (x[200:220], y[200:220])]


def verdict() -> str:
    """Judge methods by every purpose, as the user guide shows it."""
    problem, (data, queries) = trained()
    model, likelihood = problem.model, problem.likelihood
    stats = fl.collect(model, data, likelihood)
    gradient = fl.mean_gradient(model, data, likelihood)
    asked, taken = (
        fl.collect(model, part, likelihood, fl.Empirical()) for part in (queries, data)
    )
    weights = copy.deepcopy(dict(model.named_parameters()))
    fl.follow(problem, "sgd-momentum", steps=30, every=30)
    drift = dict(model.named_parameters())
    found = fl.compare(
        stats,
        ["kfac", "ekfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal"],
        purpose=[
            fl.Step(gradient, damping=1e-2),
            fl.Laplace(prior_precision=1.0, data_size=200),
            fl.Influence(1e-2, asked, taken),
            fl.Pruning(weights),
            fl.EWC(weights, [drift]),
            fl.Sharpness(),
        ],
    )
    return "".join(f"- {sentence}\n" for sentence in fl.analysis.verdict(found))


def methods(folder: Path) -> None:
    """Write a page a family: what its classes say of themselves, and their matrices."""
    problem, (data, _) = trained()
    layer = fl.collect(problem.model, data, problem.likelihood, layers=["fc6"])["fc6"]
    exact = fl.ExactBlock()(layer).to_dense()
    known = {**fl.approximators(), **fl.preconditioners(), **fl.network_approximators()}
    pages: dict[str, dict[type, list[str]]] = {family: {} for family in FAMILIES}
    for name, value in known.items():
        family = type(value).__module__.split(".")[2]
        pages[family].setdefault(type(value), []).append(name)
    for family, title in FAMILIES.items():
        text = heading(title)
        text += inspect.getdoc(importlib.import_module(f"fisherlab.approximators.{family}"))
        text += measured([name for names in pages[family].values() for name in names])
        for kind, names in pages[family].items():
            text += "\n\n" + heading(", ".join(names), "-")
            text += f".. autoclass:: fisherlab.{kind.__name__}\n   :no-index:\n\n"
            for name in names:
                text += picture(name, layer, exact, folder)
        (folder / f"{family}.rst").write_text(text, encoding="utf-8")


def measured(names: list[str]) -> str:
    """Return the errors of methods on the networks that `docs/measure.py` measured."""
    found = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))
    errors, networks = found["errors"], found["networks"]
    known = [name for name in names if all(name in column for column in errors.values())]
    if not known:
        return ""
    text = (
        "\n\n.. list-table:: Relative error of all layers together\n   :header-rows: 1\n\n"
    )
    rows = [["method", *errors]]
    rows += [[f"``{n}``", *(f"{errors[e][n]:.3g}" for e in errors)] for n in known]
    for row in rows:
        text += "".join(f"   {'* -' if not i else '  -'} {c}\n" for i, c in enumerate(row))
    told = "; ".join(f"{name}: {words}" for name, words in networks.items())
    return text + (
        f"\n√(Σ‖F − F̂‖² / Σ‖F‖²) over the layers that have Kronecker factors, on "
        f"{found['examples']} digits after {found['steps']} steps of training ({told}). "
        f"Measured {found['measured_at']} with torch {found['torch']} by "
        "``python docs/measure.py``.\n\n"
    )


def picture(name: str, layer: fl.LayerStatistics, exact: torch.Tensor, folder: Path) -> str:
    """Draw a matrix beside the exact one, where the method estimates a block."""
    if name not in fl.approximators() or name == "exact":
        return ""
    matrix = fl.approximators()[name](layer).to_dense()
    error = float((matrix - exact).norm() / exact.norm())
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    vmax = float(exact.abs().quantile(0.995))
    for ax, title, entries in zip(axes, ("exact", name), (exact, matrix), strict=True):
        fl.plots.heatmap(xr.DataArray(entries, dims=("row", "col")), ax=ax, vmax=vmax)
        ax.set_title(title)
    figure.savefig(folder / f"{name}.png", dpi=80)
    plt.close(figure)
    return (
        f".. figure:: {name}.png\n   :alt: exact block and {name}\n\n"
        f"   ``{name}``: relative error {error:.3f} on the last layer of the digits' "
        "network after 50 steps of training.\n\n"
    )


def benchmarks() -> str:
    """Return tables of the results that `make bench` stored."""
    text = (
        "# Benchmarks\n\nSeconds of the results in `tests/benchmarks/results/`, written by "
    )
    text += "`make bench`; one run each, so read the ratios.\n"
    for path in sorted((ROOT / "tests" / "benchmarks" / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        machine = found["machine"]
        text += f"\n## {machine['processor']}, {machine['threads']} threads, "
        text += f"torch {machine['torch']}, {machine['measured_at'][:10]} ({path.stem})\n"
        for case in found.get("cases", []):
            seconds = case.get("seconds") or {}
            text += f"\n### {case['case']}\n\n{case.get('note', '')}\n\n"
            text += table(
                ("what", "seconds"), [(k, f"{v:.4g}") for k, v in seconds.items()]
            )
        for part in ("autoencoder", "cnn"):
            steps = found.get(part, {}).items()
            rows = [
                (n, f"{v['milliseconds']:.1f}", f"{v['times_adam']:.2f}") for n, v in steps
            ]
            text += f"\n### A step, {part}\n\n" if rows else ""
            text += table(("optimiser", "milliseconds", "times Adam"), rows)
    return text


def ranks() -> str:
    """Return what a rank holds, sends and computes in a step, from one to thousands."""
    model = torch.nn.Sequential(
        torch.nn.Linear(784, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 10)
    )
    fisher, sizes = fl.MonteCarlo(), (1, 8, 64, 1024, 4096)
    probed = Probed.of(model, (torch.zeros(2, 784), None), fl.Categorical())
    own, collection = probed.plans(fisher, 2**30, examples=64)
    rows = []
    for name in ("diagonal", "kfac", "ekfac", "kpsvd-2", "exact"):
        method, found = fl.approximators()[name], []
        for size in sizes:
            whole, _ = probed.plans(fisher, 2**30, examples=64 * size)
            found.append(shares({name: method}, whole, own, collection, size, 4))
        rows.append((f"`{name}`", "held", *(readable(one.bytes) for one in found)))
        rows.append(("", "sent", *(readable(one.step_bytes) for one in found)))
        rows.append(("", "received", *(readable(one.wire_bytes) for one in found)))
        rows.append(("", "multiply-adds", *(f"{one.flops:.2g}" for one in found)))
    return table(("method", "a rank's", *(f"R = {size:,}" for size in sizes)), rows)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table of Markdown; nothing for no rows."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""
