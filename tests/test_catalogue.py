"""A metric is a function and a row of facts, or a function of the user alone."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import fisherlab as fl
from fisherlab.catalogue import METRICS, QUANTITIES, Quantity, quantity
from fisherlab.metrics import register


@pytest.fixture(scope="module")
def stats():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    )
    return fl.collect(model.double(), (torch.randn(12, 3).double(), None), fl.Categorical())


def test_every_metric_of_the_catalogue_is_a_public_function_of_its_name():
    assert set(fl.metrics.entries()) == set(METRICS)
    assert set(METRICS) - {"reverse_gaussian_kl"} <= set(dir(fl.metrics))


def test_a_result_is_labelled_by_the_catalogue(stats):
    gradient = {name: torch.ones(stats[name].weight_shape) for name in stats}
    ds = fl.compare(stats, ["kfac"], metrics=list(METRICS), damping=0.1, gradient=gradient)
    for name in ds.data_vars:
        facts = QUANTITIES[name]
        assert ds[name].attrs == {
            "long_name": facts.long_name or facts.title,
            "units": facts.unit,
        }


def test_a_function_of_ones_own_is_a_metric_of_the_table_the_figure_and_the_page(
    stats, tmp_path
):
    def largest(exact, approx):
        return float((exact.to_dense() - approx.to_dense()).abs().max())

    ds = fl.compare(stats, ["kfac", "diagonal"], metrics={"largest_entry": largest})
    kfac = fl.KFAC()(stats["0"])
    expected = largest(fl.ExactBlock()(stats["0"]), kfac)
    assert np.isclose(float(ds.largest_entry.sel(layer="0", approximator="kfac")), expected)
    assert quantity("largest_entry", ds.largest_entry).title == "largest entry"
    assert "largest_entry" in ds.fisherlab.table()
    assert ds.fisherlab.errors("largest_entry").get_ylabel() == "largest entry"
    plt.close("all")
    page = fl.report.write(ds, tmp_path / "report").read_text()
    assert "largest entry" in page
    assert f"{expected:.9g}" in page


def test_a_metric_of_ones_own_may_stand_among_names(stats):
    def twice(exact, approx):
        return 2 * fl.metrics.frobenius_error(exact, approx)

    ds = fl.compare(stats, ["kfac"], metrics=["frobenius_error", twice])
    np.testing.assert_allclose(ds.twice, 2 * ds.frobenius_error)


def test_a_row_of_facts_and_a_function_make_a_metric(stats, tmp_path, monkeypatch):
    """The two steps of CONTRIBUTING.md."""
    monkeypatch.setattr(register, "_MEASURES", dict(register._MEASURES))

    @register.of_matrices
    def trace_gap(pair):
        return abs(pair.exact.trace() - pair.approx.trace())

    facts = Quantity(
        "trace_gap",
        "trace gap",
        symbol=r"$|\mathrm{tr}\,F-\mathrm{tr}\,\hat{F}|$",
        formula="|tr F − tr F̂|",
        best="low",
        perfect=0.0,
        meaning="How far the total curvatures are apart.",
        needs="matrix",
    )
    for known in (QUANTITIES, METRICS):
        monkeypatch.setitem(known, facts.name, facts)
    ds = fl.compare(stats, ["tkfac", "lanczos-2", "kfac"], metrics=["trace_gap"])
    cell = ds.trace_gap.sel(layer="2", approximator="kfac")
    expected = trace_gap(fl.ExactBlock()(stats["2"]), fl.KFAC()(stats["2"]))
    assert float(cell) == expected
    assert ds.trace_gap.attrs == facts.attrs
    label = ds.fisherlab.errors("trace_gap").get_ylabel()
    assert label.split() == facts.label.split()
    plt.close("all")
    page = fl.report.write(ds, tmp_path / "report").read_text()
    assert facts.formula in page
    assert facts.meaning in page
