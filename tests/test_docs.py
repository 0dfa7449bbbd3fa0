"""Laws of the site's sources: short scripts that draw, pages that run, names that exist."""

import ast
import importlib.util
import json
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import fisherlab as fl

DOCS = Path(__file__).parent.parent / "docs"
GALLERY = sorted(DOCS.glob("gallery/*/*.py"))
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(DOCS.parent.glob("*.md"))]
OUTSIDE = {  # looked at by a person, as tests ask nobody elsewhere
    "https://keepachangelog.com/en/1.1.0/",
    "https://semver.org/",
}
QUICK = {"plot_errors", "plot_inverse", "plot_sharpness"}


def lines_of_code(path: Path) -> int:
    """Lines that are neither blank nor of the docstring."""
    text = path.read_text(encoding="utf-8")
    end = ast.parse(text).body[0].end_lineno
    return sum(bool(line.strip()) for line in text.splitlines()[end:])


def test_the_gallery_has_many_short_scripts():
    assert len(GALLERY) >= 25
    assert {path.stem for path in GALLERY} >= QUICK
    assert not {path.name: n for path in GALLERY if (n := lines_of_code(path)) > 15}


def _weighed(path: Path) -> object:
    marks = () if path.stem in QUICK else (pytest.mark.slow,)
    return pytest.param(path, id=path.stem, marks=[*marks, pytest.mark.draws("scripts")])


@pytest.mark.parametrize("path", [_weighed(path) for path in GALLERY])
def test_a_script_of_the_gallery_draws(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        runpy.run_path(str(path))
        drawn = [plt.figure(number) for number in plt.get_fignums()]
        assert len(drawn) == 1
        assert any(ax.has_data() or ax.texts for ax in drawn[0].axes)
    finally:
        plt.close("all")


@pytest.mark.parametrize(
    "page", ["get_started", pytest.param("user_guide", marks=pytest.mark.slow)]
)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys, unrendered):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {})
    plt.close("all")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_names_of_the_package_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`fl((?:\.[A-Za-z]\w*)+)", text):
        value: object = fl
        for part in name[1:].split("."):
            value = getattr(value, part)


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_of_ranks_is_the_one_that_is_computed(generate):
    assert generate.ranks() in (DOCS / "ranks.md").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name(generate):
    listed = {name for module in fl._MODULES for name in generate.public_names(module)}
    assert set(fl._NAMES) <= listed
    families = {
        type(value).__module__.split(".")[2]
        for known in (fl.approximators(), fl.preconditioners(), fl.network_approximators())
        for value in known.values()
    }
    assert families <= set(generate.FAMILIES)
    for page in ("reference", "methods"):
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        parts = fl._MODULES if page == "reference" else generate.FAMILIES
        assert set(parts) == set(re.findall(rf"generated/{page}/(\w+)", text))


def test_every_method_was_measured_on_three_networks():
    """`python docs/measure.py` measures again, after a method came or changed."""
    found = json.loads((DOCS / "measured.json").read_text(encoding="utf-8"))
    assert list(found["errors"]) == list(found["networks"])
    assert len(found["errors"]) == 3
    for errors in found["errors"].values():
        assert list(errors) == list(fl.approximators())
        assert errors["exact"] == 0
        best = [errors[f"kpsvd{rank}"] for rank in ("", "-2", "-3", "-4")]
        assert best == sorted(best, reverse=True)
        assert best[0] <= min(errors[name] for name in ("kfac", "tkfac", "shampoo", "foof"))
        assert errors["ekfac"] <= errors["kfac"]
        assert errors["unit-wise"] <= errors["quasi-diagonal"] <= errors["diagonal"]


def anchors(page: Path) -> set[str]:
    """Return what links into a page may name: its headings, as GitHub writes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
    return {head.strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        if name.startswith("generated/"):
            continue  # sphinx refuses those that are not made
        home = page.parent / name if name else page
        assert home.exists(), target
        assert not heading or heading in anchors(home), target
    for name in re.findall(r"\{doc\}`(?:[^`<]*<)?([\w/]+)>?`", text):
        made = name.startswith("generated/")
        assert made or (page.parent / f"{name}.md").exists(), name


def test_links_that_leave_the_project_are_known():
    found = {
        link
        for page in PAGES
        for link in re.findall(r"https?://[^\s)>`\"]+", page.read_text(encoding="utf-8"))
    }
    assert found == OUTSIDE


def test_the_pictures_of_the_readme_are_small():
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    pictures = [DOCS.parent / name for name in re.findall(r"\]\(([^)]+\.png)\)", text)]
    assert len(pictures) >= 2
    assert not [path for path in pictures if path.stat().st_size > 150_000]
