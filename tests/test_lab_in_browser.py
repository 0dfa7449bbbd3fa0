"""JupyterLab as `fisherlab lab` opens it: a notebook runs, and its explorer answers."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.browsers import NEEDED, browser, free_port, wait_for

__all__ = ["browser"]  # a fixture
pytestmark = [*NEEDED, pytest.mark.slow]

EXPOSED = "c.LabApp.expose_app_in_browser = True\n"
CELLS = """const cells = window.jupyterapp.shell.currentWidget.content.model.cells;
    const all = Array.from({length: cells.length}, (_, i) => cells.get(i).toJSON());"""
DRAWN = """return [...document.querySelectorAll("img")].map(image => image.alt)
    .find(words => words.startsWith("Explorer(") && words.includes(arguments[0]))"""
RESTARTED = "debug_request message before replies were done"  # JupyterLab's own words
COMMAND = """window.jupyterapp.commands.execute(arguments[0], arguments[1]);
    return true"""
EDGES = """const image = document.querySelector('img[alt^="Explorer("]');
    image.scrollIntoView({block: "center"});
    const box = image.getBoundingClientRect(); return [box.left, box.right]"""
CHOOSE = """const [found] = [...document.querySelectorAll(".widget-dropdown select")]
    .map(list => [list, [...list.options].map(one => one.text.replace(/\u00a0/g, " "))])
    .filter(([list, words]) => words.includes(arguments[0]));
    if (!found) return false;
    const [list, words] = found; list.selectedIndex = words.indexOf(arguments[0]);
    list.dispatchEvent(new Event("change", {bubbles: true}));
    window.chosen = list; return true"""


@pytest.fixture
def lab(tmp_path):
    """Start `fisherlab lab` on copies of the notebooks, and give its address."""
    port = free_port()
    (tmp_path / "jupyter_lab_config.py").write_text(EXPOSED, "utf-8")
    own = {"JUPYTER_TOKEN": "known", "JUPYTER_CONFIG_DIR": str(tmp_path)}
    words = ["lab", str(tmp_path / "notebooks"), "--no-browser", "--allow-root"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "fisherlab", *words, f"--port={port}"],
            env=os.environ | own,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(port, 60)
        yield f"http://127.0.0.1:{port}/lab/tree/01_first_block.ipynb?reset&token=known"
    finally:
        server.terminate()
        server.wait(20)


def _run_all_cells(browser):
    """Press the button that runs a notebook from the start; return its cells."""
    button = '[data-jp-item-name="restart-and-run"] jp-button'
    idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
    browser.wait(
        f"""return document.querySelector('{button}') && document.querySelector('{idle}')
            && !document.querySelector(".jp-Spinner")"""
    )
    browser.click(button)
    browser.wait("return document.querySelector('.jp-Dialog .jp-mod-accept')")
    browser.click(".jp-Dialog .jp-mod-accept")
    done = """const code = all.filter(cell => cell.cell_type === "code");
        return code.length && code.every((cell, i) => cell.execution_count === i + 1) &&
            document.querySelector(arguments[0])"""
    browser.wait(f"{CELLS} {done}", idle)
    return browser.run(f"{CELLS} return all")


def test_a_notebook_runs_in_jupyterlab_and_its_explorer_answers(browser, lab, tmp_path):
    browser.log("browser")
    browser.open(lab)
    cells = _run_all_cells(browser)
    kinds = [output["output_type"] for cell in cells for output in cell.get("outputs", [])]
    assert "error" not in kinds
    (place,) = [
        i for i, cell in enumerate(cells) if "fl.explore(" in "".join(cell["source"])
    ]
    browser.run(
        "window.jupyterapp.shell.currentWidget.content.activeCellIndex = arguments[0]",
        place,
    )
    browser.wait(DRAWN, "figure='by layer'")
    browser.wait(CHOOSE, "inverse_error")
    browser.wait(DRAWN, "quantity='inverse_error'")
    assert browser.run("return window.chosen.isConnected")  # or the keyboard would lose it
    browser.wait(CHOOSE, "against damping")
    browser.wait(DRAWN, "figure='against damping', quantity='inverse_error'")
    folder = Path(os.environ.get("FISHERLAB_PICTURES", tmp_path))
    browser.run(COMMAND, "application:toggle-left-area", {})  # the files, for room
    for width, theme in product((1280, 390), ("Light", "Dark")):
        browser.resize(width)
        browser.run(COMMAND, "apputils:change-theme", {"theme": f"JupyterLab {theme}"})
        browser.wait(
            "return document.body.dataset.jpThemeName.endsWith(arguments[0])", theme
        )
        left, right = browser.run(EDGES)
        assert 0 <= left < right <= width
        browser.picture(folder / f"explorer-{width}-{theme.lower()}.png").close()
    severe = [one for one in browser.log("browser") if one["level"] == "SEVERE"]
    assert [one for one in severe if RESTARTED not in one["message"]] == []
