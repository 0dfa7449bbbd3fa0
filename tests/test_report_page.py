"""The page says what the numbers say, whatever is in the result."""

import base64
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

import fisherlab as fl
from fisherlab import plots
from fisherlab.plots import quantity
from fisherlab.plots.style import KNOWN, SPARE
from fisherlab.report import rankings, summary, tables
from fisherlab.report.page import prose, write_page
from fisherlab.report.plates import PAPER, contrast, in_the_dark
from fisherlab.report.rankings import moment
from tests import analyses
from tests.datasets import LEVEL, comparison, inverses

VOID = {"meta", "link", "img", "br", "input"}
SMALL = {"fc": (3, 4), "out": (2, 4)}


class Page(HTMLParser):
    """Collects tags, checks that they nest, and keeps the text that is shown."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text, self.titles = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.titles += [v for k, v in attrs if k == "title"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def page_of(ds, tmp_path, tree=None, run=None):
    path = write_page(ds, tree, tmp_path, run or {})
    assert plt.get_fignums() == []
    return Page(path.read_text("utf-8"))


def small(**options):
    return comparison(**({"layers": SMALL, "steps": (0, 9)} | options))


# --- the whole page ------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = {"command": "fisherlab report --seed 3", "versions": {"torch": "2.13.0"}}
    return folder, page_of(small(), folder, inverses(SMALL), run)


def test_page_is_self_contained_and_figures_lie_beside_it(report):
    folder, page = report
    for tag, attrs in page.tags:
        source = attrs.get("src") or (attrs.get("href") if tag == "link" else None)
        assert source is None or source.startswith("data:")
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    links = [link for link in links if not link.startswith("#")]
    assert links
    assert all((folder / link).is_file() for link in links)
    assert "fisherlab report --seed 3" in page.words
    assert sorted(p.name for p in folder.iterdir()) == ["figures", "report.html"]


def test_inlined_pictures_are_the_files_with_colours_for_dark_pages(report):
    folder, page = report
    inlined = {
        re.sub(
            rb"<style>@media.*?</style>", b"", base64.b64decode(attrs["src"].split(",")[1])
        )
        for tag, attrs in page.tags
        if tag == "img"
    }
    files = {p.read_bytes() for p in (folder / "figures").iterdir()}
    assert len(inlined) == 8
    assert inlined <= files


@pytest.mark.parametrize(
    ("metric", "closest"),
    [("frobenius_error", "min"), ("cosine_similarity", "max"), ("inverse_error", "min")],
)
def test_the_star_is_on_the_closest_of_each_layer(metric, closest):
    ds = comparison(seed=2)
    table = tables.metric_table(moment(ds))
    column = table.heads.index(quantity(metric).title)
    starred = {r.layer: r.approximator for r in table.rows if r.cells[column].best}
    values = ds[metric].isel(step=-1).drop_sel(approximator="exact")
    values = values.sel(damping=0.01) if "damping" in values.dims else values
    expected = getattr(values, f"idx{closest}")("approximator").to_series()
    assert starred == expected.to_dict()


def cell_named(ds, origin):
    """Return the value of `metric[step=9, layer=fc, …]`, as the page names it."""
    name, where = re.fullmatch(r"(\w+)\[(.*)\]", origin).groups()
    cell = ds[name]
    for dim, value in (each.split("=") for each in where.split(", ")):
        if dim in cell.dims:
            cell = cell.sel({dim: value if cell[dim].dtype.kind in "UO" else float(value)})
    return cell.item()


def test_every_number_of_a_table_names_its_cell():
    ds = small()
    for step in (0, 9):
        m = moment(ds, step)
        errors = tables.error_table(m, ("kfac", "diagonal"))
        for table in (errors, tables.metric_table(m)):
            for row in table.rows:
                names = {"layer": row.layer, "approximator": row.approximator}
                for origin, cell in zip(table.origins, row.cells, strict=True):
                    value = cell_named(ds, origin.format(**names))
                    assert cell.key == f"{value:.9g}"


@pytest.mark.usefixtures("one_figure")
def test_heads_of_columns_name_the_cells_below_them(tmp_path):
    origins = {attrs.get("data-origin") for _, attrs in page_of(small(), tmp_path).tags}
    assert "frobenius_error[step=9, layer={layer}, approximator=kfac]" in origins
    where = "step=0, layer={layer}, approximator={approximator}, damping=0.01"
    assert f"direction_cosine[{where}]" in origins


@pytest.mark.usefixtures("one_figure")
def test_what_is_missing_is_said_once_a_row_and_costs_little(tmp_path):
    ds = small(layers={f"layer{i}": (3, 4) for i in range(20)}, steps=(0,))
    for name, values in ds.data_vars.items():
        if "approximator" in values.dims and values.dtype.kind == "f":
            ds[name].loc[{"approximator": ["kfac", "kpsvd"]}] = np.nan
    ds["inverse_error"].loc[{"approximator": "mini-block"}] = np.nan
    ds["status"][:] = "left out for size (kept short)"
    page = write_page(ds, None, tmp_path, {}).read_text("utf-8")
    (main,) = re.findall(r'<table class="full" id="metrics">.*?</table>', page, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", main, re.DOTALL)[1:]
    whole = [row for row in rows if "<code>kfac<" in row or "<code>kpsvd<" in row]
    assert len(whole) == 2 * 20
    assert all(row.count("<td") == 2 for row in whole)
    assert all("not available: left out for size (kept short)" in row for row in whole)
    parts = [row for row in rows if "<code>mini-block<" in row]
    assert all('data-why="left out for size (kept short)"' in row for row in parts)
    assert all(row.count("left out") == 1 for row in [*whole, *parts])
    # Numbers and their markup; before, names of cells made it three times as much.
    known = [row for row in rows if row not in whole]
    assert sum(map(len, known)) < 75 * sum(row.count("<td") for row in known)
    assert sum(map(len, whole)) < 400 * len(whole)


@pytest.mark.usefixtures("one_figure")
def test_the_same_result_gives_the_same_page(tmp_path):
    pages = [write_page(small(), None, tmp_path / name, {}).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


@pytest.mark.usefixtures("one_figure")
@pytest.mark.parametrize(
    "name",
    ['<script>alert("x")<script>', 'it\'s "quoted" & `code`', "слой.層", "n" * 300],
)
def test_any_name_is_text_never_markup(name, tmp_path):
    ds = small(layers={name: (3, 4), "out": (2, 4)})
    ds.attrs["model"] = ds.attrs["problem"] = name
    page = page_of(ds, tmp_path, inverses({name: (3, 4)}))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert name in page.words


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(
    "ds",
    [
        small(layers={"fc": (3, 4)}),
        pytest.param(small(steps=None), marks=pytest.mark.slow),
        small(steps=(5,)),
        pytest.param(small(approximators=("exact", "kfac")), marks=pytest.mark.slow),
        pytest.param(small(approximators=("exact",)), marks=pytest.mark.slow),
        small(approximators=("kfac",)),
        pytest.param(small(dampings=None), marks=pytest.mark.slow),
        small(dampings=None, steps=None).drop_vars("damping"),
        pytest.param(small()[["frobenius_error"]], marks=pytest.mark.slow),
        small().drop_vars("frobenius_error"),
        small().drop_vars(["d_out", "d_in", "lambda", "status"]),
        small(steps=None)[["frobenius_error"]].assign_attrs({}),
        pytest.param(
            small().assign_attrs(approximators="not json"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda ds: str(dict(ds.sizes)),
)
def test_sparse_results_still_make_a_page(ds, tmp_path):
    assert "Verdict" in page_of(ds, tmp_path).words


@pytest.mark.usefixtures("one_figure")
def test_an_empty_column_says_why(tmp_path):
    ds = small()
    for name, values in ds.data_vars.items():
        if "approximator" in values.dims and values.dtype.kind == "f":
            ds[name].loc[{"approximator": "kfac"}] = np.nan
    ds["status"].loc[{"approximator": "kfac"}] = "KFAC needs the shared form"
    page = page_of(ds, tmp_path)
    assert "not available: KFAC needs the shared form" in page.words
    assert "nan" not in page.words.lower().replace("finance", "")


@pytest.mark.usefixtures("one_figure")
def test_a_verdict_answers_in_sight_and_folds_the_rest(tmp_path):
    ds = small()
    page = page_of(ds, tmp_path)
    (told,) = (one for one in summary.verdict(ds) if one.topic == "matrix")
    assert told.headline.count(". ") == 0
    assert "; `" in told.headline
    assert "the numbers of the exact blocks" in told.headline
    text = (tmp_path / "report.html").read_text("utf-8")
    folded = "".join(re.findall(r"<details><summary>Layers.*?</details>", text, re.DOTALL))
    assert prose(told.details) in folded
    assert prose(told.headline) not in folded
    assert prose(told.headline) in text
    assert page.words.count(" ".join(re.sub("`", "", told.headline).split())) == 1


@pytest.mark.usefixtures("one_figure")
def test_absent_metrics_are_named(tmp_path):
    page = page_of(small().drop_vars("inverse_error"), tmp_path)
    assert "inverse error : not available" in page.words.replace("error:", "error :")


@pytest.mark.usefixtures("one_figure")
def test_layers_that_are_numbers_show_what_they_are(tmp_path):
    """In tables, figures and sentences; other names speak for themselves."""
    kinds = ["Conv2d 3→16", "Linear 3→2"]
    ds = small(layers={"net.0": (3, 4), "out": (2, 4)})
    ds = ds.assign_coords(kind=("layer", kinds))
    ds["fisher_norm"].loc[{"layer": "net.0"}] = 0.0
    m = moment(ds)
    assert m.shapes == ("Conv2d 3→16 3×4", "2×4")
    told = " ".join(one.text for one in summary.verdict(ds))
    assert "zero in layer net.0 · Conv2d 3→16, 1 of 2" in told
    labels = [t.get_text() for t in plots.errors(ds).get_xticklabels()]
    assert labels == ["net.0\nConv2d 3→16\n3×4", "out\n2×4"]
    titles = [ax.get_title() for ax in plots.trajectory(ds).axes.flat]
    assert titles == ["layer net.0 · Conv2d 3→16", "layer out"]
    plt.close("all")
    old = ds.drop_vars("kind")
    assert moment(old).titles == ("net.0", "out")
    both = fl.analysis.merge([ds.sel(layer=["net.0"]), old.sel(layer=["out"])])
    assert both["kind"].values.tolist() == ["Conv2d 3→16", ""]


@pytest.mark.usefixtures("one_figure")
def test_a_value_below_the_floor_is_not_shown_as_measured(tmp_path):
    ds = small()
    ds["frobenius_error"].loc[{"approximator": "kpsvd-2"}] = 3.2e-9
    page = page_of(ds, tmp_path)
    assert "< 1e-6 (numerical floor)" in page.words
    assert "3.20e-09" not in page.words


@pytest.mark.usefixtures("one_figure")
def test_a_page_survives_a_round_trip_through_netcdf(tmp_path):
    small().to_netcdf(tmp_path / "results.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "results.nc", engine="h5netcdf") as ds:
        again = page_of(ds.load(), tmp_path / "again").words
    assert again == page_of(small(), tmp_path / "direct").words


# --- verdict -------------------------------------------------------------------------


def test_standings_follow_an_independent_ranking():
    ds = comparison()
    last = ds["frobenius_error"].isel(step=-1).drop_sel(approximator="exact")
    squares = ds["fisher_norm"].isel(step=-1) ** 2
    whole = np.sqrt((last**2 * squares).sum("layer") / squares.sum("layer"))
    expected = whole.to_series().sort_values()
    ranking = rankings.standings(moment(ds))
    assert [s.name for s in ranking] == list(expected.index)
    np.testing.assert_allclose([s.error for s in ranking], expected.values)
    winners = last.idxmin("approximator").to_series().value_counts()
    assert {s.name: s.won for s in ranking if s.won} == winners.to_dict()


@pytest.mark.usefixtures("one_figure")
@pytest.mark.parametrize("pooled", [True, False])
def test_a_layer_that_is_matched_exactly_does_not_rule_the_ranking(pooled, tmp_path):
    ds = comparison(approximators=("kfac", "mini-block"))
    ds["frobenius_error"].loc[{"approximator": "kfac"}] = 0.1
    ds["frobenius_error"].loc[{"approximator": "mini-block"}] = 0.8
    ds["frobenius_error"].loc[{"approximator": "mini-block", "layer": "10"}] = 5e-16
    ds = ds if pooled else ds.drop_vars("fisher_norm")
    words = page_of(ds, tmp_path).words
    assert ("relative error: 0.1, then mini-block with" in words) == pooled
    assert ("is kfac in 5 of 6 layers" in words) != pooled
    assert ("of all layers together, √(" in words) == pooled
    assert ("error: median over the layers" in words) != pooled


def test_shares_are_totals_over_totals():
    ds = comparison()
    stored = ds["stored_numbers"].sum("layer")
    expected = float(stored.sel(approximator="kfac") / stored.sel(approximator="exact"))
    found = {s.name: s.share for s in rankings.standings(moment(ds))}["kfac"]
    assert found == pytest.approx(expected)


def test_an_approximation_measured_in_few_layers_does_not_lead():
    ds = comparison()
    ds["frobenius_error"].loc[{"approximator": "diagonal", "layer": "0"}] = 0.01
    ds["frobenius_error"].loc[
        {"approximator": "diagonal", "layer": ["2", "4", "6", "8", "10"]}
    ] = np.nan
    ranking = rankings.standings(moment(ds))
    assert ranking[0].name == "kpsvd-2"
    assert ranking[-1].name == "diagonal"
    assert not ranking[-1].complete
    text = summary.verdict(ds)[0].text
    # Its error is set against the others' where it has one, and nowhere else.
    assert "is `kpsvd-2` in 5 of 6 layers" in text
    assert "`diagonal` in 1 (" in text
    assert "`diagonal` has no number in 2, 4, 6, …" in text


def test_verdict_speaks_of_the_last_step_and_tells_the_way_there():
    ds = comparison(seed=4)
    topics = {s.topic: s.text for s in summary.verdict(ds)}
    error = ds["frobenius_error"].sel(approximator="kpsvd-2")
    squares = ds["fisher_norm"] ** 2
    mean = np.sqrt((error**2 * squares).sum("layer") / squares.sum("layer")).values
    assert f"relative error: {mean[-1]:.3g}, then" in topics["matrix"]
    assert f"grows from {mean[0]:.3f} to {mean[-1]:.3f}" in topics["training"]
    assert "is `kpsvd-2` in 6 of 6 layers (100 %)" in topics["direction"]


def test_verdict_says_when_direction_prefers_another():
    ds = comparison()
    ds["direction_cosine"].loc[{"approximator": "mini-block"}] = 0.9999
    told = {s.topic: s.text for s in summary.verdict(ds)}
    assert "is `mini-block` in 6 of 6 layers" in told["direction"]
    assert told["matrix"].startswith("`kpsvd-2` is the closest")


def test_verdict_says_where_the_closest_is_indefinite():
    ds = comparison()
    for metric in ("direction_cosine", "inverse_error"):
        ds[metric].loc[{"approximator": "kpsvd-2", "layer": "0"}] = np.nan
    why = "damping 0.01: not positive definite (smallest eigenvalue -1, λ above 0.7 needed)"
    ds["status"].loc[{"approximator": "kpsvd-2", "layer": "0"}] = why
    told = {s.topic: s.text for s in summary.verdict(ds)}
    words = (
        "`kpsvd-2` is indefinite in 0 (73 % of the parameters); from λ = 0.7 on it is not"
    )
    assert all(words in told[topic] for topic in ("matrix", "direction", "inverse"))


def test_exact_approximations_tie_at_the_floor():
    ds = comparison(approximators=("exact", "kfac", "ekfac", "diagonal"))
    ds["frobenius_error"].loc[{"approximator": ["kfac", "ekfac"]}] = [1e-9, 2e-9]
    text = summary.verdict(ds)[0].text
    assert text.startswith("`kfac` and `ekfac` are the closest to the exact block")


def test_without_any_value_the_verdict_gives_the_reasons():
    ds = small()
    for metric in ("frobenius_error", "direction_cosine", "inverse_error"):
        ds[metric][:] = np.nan
    ds["status"][:] = "out of memory"
    (only,) = summary.verdict(ds)
    assert "out of memory" in only.text


def test_errors_above_one_and_loose_iterations_are_cautioned():
    ds = small()
    ds["frobenius_error"].loc[{"approximator": "kfac", "layer": "fc"}] = 1.4
    ds["converged"].loc[{"approximator": "kpsvd"}] = 0
    cautions = " ".join(s.text for s in summary.verdict(ds) if s.topic == "caution")
    assert "`kfac` in layer fc" in cautions
    assert "did not converge for `kpsvd`" in cautions


# --- laws ----------------------------------------------------------------------------


def test_laws_hold_on_a_result_that_obeys_them():
    checked = rankings.laws(comparison())
    assert {(law.smaller, law.larger) for law in checked} == {
        (low, high) for low, high, _ in rankings.LAWS if {low, high} <= set(LEVEL)
    }
    assert all(law.holds and law.checked == 24 for law in checked)


@pytest.mark.usefixtures("one_figure")
def test_a_broken_law_names_its_cell_and_reaches_the_page(tmp_path):
    ds = small()
    cell = {"layer": "fc", "approximator": "kpsvd", "step": 0}
    ds["frobenius_error"].loc[cell] = 0.9
    (broken,) = [law for law in rankings.laws(ds) if law.smaller == "kpsvd"]
    assert len(broken.broken) == 1
    assert broken.broken[0].startswith("step=0, layer=fc: kpsvd 0.900 > kfac 0.")
    assert "Broken in 1 of 4 cells" in page_of(ds, tmp_path).words


def test_a_law_ignores_differences_below_the_floor():
    ds = small()
    ds["frobenius_error"].loc[{"approximator": ["kfac", "kpsvd"]}] = [1e-9, 5e-7]
    assert all(law.holds for law in rankings.laws(ds) if law.smaller == "kpsvd")


# --- noise ---------------------------------------------------------------------------


def test_the_verdict_tells_the_noise_and_what_it_hides():
    ds = analyses.uncertainty()
    told = {s.topic: s.text for s in summary.verdict(ds)}["noise"]
    assert "0.100–0.350 (relative) away" in told
    within = ds["below_noise"].sel(approximator="kpsvd-2")
    names = ", ".join(within["layer"].values[within.values == 1])
    assert names
    assert f"`kpsvd-2` in layers {names}" in told
    assert "Not told apart from the closest at 95 %" in told


def test_the_choice_at_each_cost_is_the_closest_that_holds_no_more():
    ds = comparison()
    m = moment(ds)
    ranking = rankings.standings(m)
    found = rankings.choices(m, ranking)
    share = {s.name: s.share for s in ranking}
    limits = sorted({share[s] for s in ("diagonal", "kpsvd", "kpsvd-2")})
    assert len(found.limits) == len(limits)
    errors = ds["frobenius_error"].isel(step=-1)
    for layer, _, cells in found.rows:
        for cell, limit in zip(cells, limits, strict=True):
            names = [name for name in share if share[name] <= limit * (1 + 1e-9)]
            row = errors.sel(layer=layer, approximator=names)
            assert cell.name == row.idxmin("approximator").item()


def test_a_bound_is_shown_as_a_bound():
    ds = comparison(layers=SMALL)
    ds["floored"] = (("layer", "approximator"), np.full((2, 7), "", dtype=object))
    place = {"layer": "fc", "approximator": "kfac"}
    ds["floored"].loc[place] = "cosine_similarity, direction_cosine[damping=0.01]"
    table = tables.metric_table(moment(ds))
    (row,) = [r for r in table.rows if (r.layer, r.approximator) == ("fc", "kfac")]
    shown = dict(zip(table.heads, (cell.text for cell in row.cells), strict=True))
    assert shown["matrix cosine"].startswith("< ")
    assert shown["direction cosine"].startswith("< ")
    assert not shown["inverse error"].startswith("< ")


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(
    "make", [analyses.uncertainty, analyses.decomposition, analyses.pareto]
)
def test_other_analyses_make_a_page_too(make, tmp_path):
    assert "Verdict" in page_of(make(), tmp_path).words


def test_a_layer_with_one_candidate_is_won_by_nobody():
    ds = comparison(steps=None)
    first = str(ds.layer.values[0])
    ds["frobenius_error"].loc[{"layer": first}] = np.nan
    ds["frobenius_error"].loc[{"layer": first, "approximator": "kfac"}] = 0.5
    won = rankings.winners(moment(ds))
    assert set(won) == {str(name) for name in ds.layer.values} - {first}
    alone = rankings.winners(moment(ds.sel(approximator=["kfac"])))
    assert alone[first] == ("kfac",)


@pytest.mark.parametrize("look", [*KNOWN.values(), *SPARE], ids=lambda look: look.color)
def test_every_colour_stands_out_on_dark_paper_and_keeps_its_hue(look):
    import colorsys

    before, after = (
        [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        for colour in (look.color, in_the_dark(look.color))
    )
    assert contrast(tuple(after)) > 3
    if max(before) - min(before) > 0.12:
        assert contrast(tuple(after)) > 4.5
        hues = [colorsys.rgb_to_hls(*channels)[0] for channels in (before, after)]
        assert hues[0] == pytest.approx(hues[1], abs=0.01)


def test_greys_turn_round_in_the_dark():
    greys = [in_the_dark(f"#{k:02x}{k:02x}{k:02x}") for k in range(0, 256, 15)]
    levels = [sum(int(grey[i : i + 2], 16) for i in (1, 3, 5)) for grey in greys]
    assert levels == sorted(levels, reverse=True)
    assert greys[-1] == "#" + "".join(f"{c:02x}" for c in PAPER)


def test_a_median_over_fewer_layers_says_so():
    ds = comparison(seed=4).isel(step=-1)
    ds["direction_cosine"] = ds["direction_cosine"].copy(deep=True)
    ds["direction_cosine"].loc[{"approximator": "kfac", "layer": ds["layer"][0]}] = np.nan
    m = moment(ds)
    rows = {row["name"]: row for row in tables.standing_rows(rankings.standings(m), m)}
    count = ds.sizes["layer"] - 1
    assert rows["kfac"]["direction_of"] == f"of {count} layer{'s' * (count > 1)}"
    assert not any(row["direction_of"] for name, row in rows.items() if name != "kfac")


def test_what_equals_the_exact_block_is_grey_and_not_starred():
    ds = comparison(seed=5).isel(step=-1)
    ds["trace_ratio"] = ds["frobenius_error"] * 0 + 0.9
    ds["trace_ratio"].loc[{"approximator": "diagonal"}] = 1 + 1e-9
    table = tables.metric_table(moment(ds))
    column = table.heads.index(quantity("trace_ratio").title)
    given = {row.approximator for row in table.rows if row.cells[column].given}
    assert given - {"exact"} == {"diagonal"}
    assert not any(row.cells[column].best for row in table.rows)


def test_an_accuracy_says_over_how_many_examples(tmp_path):
    ds = comparison(seed=6).isel(layer=[0], approximator=[0, 1])
    ds["test_accuracy"] = "step", np.full(ds.sizes["step"], 0.984), {"examples": 64}
    text = write_page(ds, None, tmp_path, {}).read_text("utf-8")
    assert re.search("test accuracy 98.% of 64 examples", text)
    assert "Over 64 test examples, drawn at random." in text
