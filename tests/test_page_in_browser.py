"""The page in a real browser: quiet, alone, and answering to clicks."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from fisherlab.report.page import write_page
from tests.browsers import NEEDED, browser
from tests.datasets import comparison, inverses

__all__ = ["browser"]  # a fixture
pytestmark = NEEDED
NASTY = '<script>alert("x")</script> it\'s "層" ' + "n" * 300
# How wide the page is with everything unfolded; tables and pictures scroll in boxes.
WIDTH = """for (const each of document.querySelectorAll("details")) each.open = true;
    return document.documentElement.scrollWidth"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = {"command": "fisherlab report", "versions": {"torch": "2.13.0"}}
    layers = {"2": (20, 21), "10": (10, 21)}
    return write_page(comparison(layers=layers), inverses(layers), folder, run)


@pytest.fixture
def opened(browser, page):
    browser.log("browser")
    browser.log("performance")
    browser.open(page)
    return browser


def test_the_console_is_quiet_and_no_request_leaves_the_page(opened, page):
    assert opened.log("browser") == []
    events = [
        json.loads(entry["message"])["message"] for entry in opened.log("performance")
    ]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert page.as_uri() in asked
    assert all(url == page.as_uri() or url.startswith("data:") for url in asked)


def test_a_click_on_a_head_sorts_by_the_numbers_behind_the_text(opened):
    column = "#metrics thead th:nth-child(3) button"
    values = """return [...document.querySelectorAll("#metrics tbody tr")]
        .map(row => row.children[2].dataset.v).filter(v => v !== "").map(Number)"""
    before = opened.run(values)
    assert before != sorted(before)
    opened.click(column)
    assert opened.run(values) == sorted(before)
    opened.click(column)
    assert opened.run(values) == sorted(before, reverse=True)


@pytest.mark.parametrize("table", ["metrics", "errors"])
def test_the_pointer_on_a_number_names_its_cell(opened, table):
    ds = comparison(layers={"2": (20, 21), "10": (10, 21)})
    step = int(ds["step"][-1])
    name = f"frobenius_error[step={step}, layer=2, approximator=kfac]"
    value = ds["frobenius_error"].sel(step=step, layer="2", approximator="kfac").item()
    titles = opened.run(
        f"""return [...document.querySelectorAll("#{table} tbody td")].map(cell => {{
            cell.dispatchEvent(new MouseEvent("mouseover", {{bubbles: true}}));
            return cell.title; }})"""
    )
    assert f"{name} = {value:.9g}" in titles
    assert any(title.endswith("(the closest of this layer)") for title in titles)


def test_a_click_folds_a_section_and_a_link_opens_it_again(opened):
    shown = 'return document.querySelector("#metrics").checkVisibility()'
    assert opened.run(shown)
    opened.click("#numbers > details > summary")
    assert not opened.run(shown)
    opened.click('nav a[href="#numbers"]')
    assert opened.run(shown)
    opened.click("#fold")
    state = 'return [...document.querySelectorAll("section > details")].map(d => d.open)'
    assert opened.run(state) == [False] * 7
    opened.click("#fold")
    assert opened.run(state) == [True] * 7


def test_typing_keeps_the_rows_that_hold_every_word(opened):
    rows = opened.run(
        """const field = document.querySelector('input[data-table="metrics"]');
        field.value = "KPSVD-2"; field.dispatchEvent(new Event("input"));
        return [...document.querySelectorAll("#metrics tbody tr")]
            .filter(row => row.checkVisibility()).map(row => row.textContent)"""
    )
    assert len(rows) == 2
    assert all("kpsvd-2" in row for row in rows)


def test_a_click_enlarges_the_heatmap_where_it_was_clicked(opened):
    width = 'return document.querySelector("img.wide").clientWidth'
    before = opened.run(width)
    opened.click("img.wide")
    assert opened.run(width) == pytest.approx(2 * before, rel=0.05)
    assert opened.run('return document.querySelector(".zoomed").scrollLeft') > 0
    for _ in range(2):
        opened.click("img.wide")
    assert opened.run(width) == before


def test_the_pointer_on_a_mark_shows_its_value(opened):
    place = opened.run(
        """const picture = document.querySelector("#figure-errors img");
        picture.scrollIntoView({block: "center"});
        const box = picture.getBoundingClientRect();
        const [x, y, text] = JSON.parse(picture.dataset.marks)[0];
        return [box.left + x * box.width, box.top + y * box.height, text]"""
    )
    move = {"type": "pointerMove", "x": round(place[0]), "y": round(place[1])}
    pointer = {"type": "pointer", "id": "mouse", "actions": [move | {"duration": 0}]}
    opened.ask("/actions", {"actions": [pointer]})
    tip = opened.run('return document.querySelector(".tip:not([hidden])").textContent')
    error = comparison(layers={"2": (20, 21), "10": (10, 21)}).frobenius_error
    first = error.isel(step=-1, layer=0).sel(approximator="kfac").item()
    assert tip == place[2] == f"kfac · 2 20×21 · {first:.4g}"


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_hangs_over_the_edge_of_a_wide_or_a_narrow_screen(
    browser, page, width, tmp_path
):
    browser.open(page, width)
    assert browser.run(WIDTH) <= width
    # Kept for eyes where a folder is named.
    folder = Path(os.environ.get("FISHERLAB_PICTURES", tmp_path))
    pixels = np.asarray(browser.picture(folder / f"report-{width}.png").convert("L"))
    assert pixels.shape[1] == width
    assert pixels.shape[0] > 3000
    assert pixels.std() > 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, page, scheme):
    browser.command(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    browser.open(page)
    ink, paper = browser.run(
        """const look = getComputedStyle(document.body);
        return [look.color, look.backgroundColor].map(
            words => words.match(/\\d+/g).slice(0, 3).map(Number))"""
    )
    browser.command("Emulation.setEmulatedMedia", features=[])
    assert (np.mean(ink) < np.mean(paper)) == (scheme == "light")
    assert _contrast(ink, paper) > 7


def _contrast(*colours):
    """Return the contrast ratio of two sRGB colours by the rule of WCAG."""
    light = []
    for colour in colours:
        share = np.array(colour) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_names_are_shown_never_run(browser, tmp_path):
    ds = comparison(layers={NASTY: (3, 4), "out": (2, 4)}, steps=(0, 9))
    ds.attrs["model"] = ds.attrs["problem"] = NASTY
    ds["status"].loc[{"approximator": "kfac"}] = NASTY
    page = write_page(ds, inverses({"out": (2, 4)}), tmp_path, {"command": NASTY})
    browser.log("browser")
    browser.open(page, 390)
    assert browser.log("browser") == []
    assert browser.run("return document.scripts.length") == 1
    heading = browser.run('return document.querySelector("h1").textContent')
    assert heading.startswith(NASTY)
    assert browser.run(WIDTH) <= 390


# --- the site, where `make docs` has built it -------------------------------------------

SITE = Path(__file__).parent.parent / "build" / "docs"
FOUND = """return [...document.querySelectorAll("ul.search li > a")]
    .map(link => link.getAttribute("href").split(/[?#]/)[0])"""


@pytest.mark.skipif(not (SITE / "search.html").exists(), reason="no site: `make docs`")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_site_is_searched_from_a_folder(browser, width):
    browser.log("browser")
    browser.open(SITE / "index.html", width)
    browser.ask("/url", {"url": f"{(SITE / 'search.html').as_uri()}?q=kpsvd"})
    found = []
    for _ in range(100):
        time.sleep(0.1)
        if found and found == browser.run(FOUND):
            break
        found = browser.run(FOUND)
    assert any(link.endswith("approximators.KPSVD.html") for link in found)
    assert not [link for link in found if not (SITE / link).exists()]
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.log("browser") == []
