"""Estimates are right before anything is allocated."""

import importlib
import re
import resource
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fisherlab as fl
from fisherlab.analysis.counts import counted
from tests import cases
from tests.model_zoo import MODULES, NETWORKS

SOME = ("twice", "conv3d", "attention", "graph", "hypernetwork")
ALL = NETWORKS | {name: MODULES[name] for name in SOME}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fisher", [fl.Exact(), fl.MonteCarlo(3)])
def test_statistics_bytes_and_flops_are_those_of_collect(name: str, fisher: object) -> None:
    case = ALL[name]()
    data = (case.x, case.y)
    found = fl.estimate(case.model, data, case.likelihood, ["exact"], fisher)
    stats = fl.collect(case.model, data, case.likelihood, fisher)
    assert found.statistics_bytes == pytest.approx(stats.nbytes, rel=0.2)
    for layer, plan in found.plans.items():
        samples = stats[layer].samples
        assert plan.statistics_bytes == samples.nbytes
        assert plan.dense_flops == pytest.approx(samples.dense_flops(), rel=0.1)
        assert plan.gram_flops == pytest.approx(samples.gram_flops(), rel=0.1)
        assert (plan.route == "Gram") == fl.ExactBlock()(stats[layer]).uses_gram


def test_batches_are_counted() -> None:
    model = nn.Linear(3, 2)
    data = [[torch.zeros(4, 3), None], [torch.zeros(3, 3), None]]
    assert fl.estimate(model, data, fl.Gaussian(), ["kfac"]).examples == 7


def test_results_hold_what_the_operators_hold() -> None:
    case = NETWORKS["mlp"]()
    names = ["kfac", "ekfac", "kpsvd", "kpsvd-2", "tkfac", "diagonal", "kfac-corrected"]
    stats = fl.collect(case.model, (case.x, None), case.likelihood)
    found = fl.estimate(case.model, (case.x, None), case.likelihood, names)
    for row in found.rows:
        operator = fl.approximators()[row.approximator](stats[row.layer])
        o, i = operator.weight_shape
        terms = getattr(operator, "terms", None)
        if terms is not None and len(terms):
            held = sum(g.nbytes + a.nbytes for g, a in terms)
        else:
            held = 8 * (o * i if row.approximator == "diagonal" else o * o + i * i + o * i)
        assert row.result_bytes == held, row


def test_over_budget_names_bytes_budget_and_what_would_fit() -> None:
    model = nn.Sequential(nn.Linear(300, 100), nn.Linear(100, 10))
    data = (torch.zeros(500, 300), None)
    asked = model, data, fl.Categorical(), ["exact", "kfac"]
    small = fl.estimate(*asked, budget="10 MiB")
    assert not small.fits
    assert re.search(r"bytes.*10\.0 MiB.*would fit.*MonteCarlo", small.advice)
    assert small.advice in repr(small)
    assert small.rows == fl.estimate(*asked, budget="1 TiB").rows
    assert "factored exact block" in fl.estimate(*asked, budget="40 MiB").advice


def test_huge_requests_allocate_nothing() -> None:
    model = nn.Linear(2000, 3000)
    data = (torch.zeros(20_000, 1).expand(-1, 2000), None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = fl.estimate(model, data, fl.Gaussian(), ["exact", "kfac"], budget="1e6 TiB")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found.plans["weight"].dense_bytes == 4 * (3000 * 2001) ** 2
    assert grown < 5e5  # kB; the data are checked, the statistics (0.7 TiB) are not made


def test_forced_forms_are_shown() -> None:
    model, data = nn.Linear(3, 2), (torch.zeros(50, 3), None)
    methods = {"dense": fl.ExactBlock(form="dense"), "gram": fl.ExactBlock(form="gram")}
    found = fl.estimate(model, data, fl.Gaussian(), methods)
    assert [row.note for row in found.rows] == ["packed GEMM", "Gram"]


def test_shown_as_text_and_html() -> None:
    case = NETWORKS["lstm"]()
    likelihood = fl.Categorical()
    found = fl.estimate(case.model, (case.x, None), likelihood, ["kfac", "low-rank"])
    text = repr(found)
    assert "needs the shared form" in text
    assert "not counted" in text
    assert len(text.splitlines()) == 2 + 2 * len(found.plans)
    assert "statistics" in found._repr_html_()


def counted_flops(work) -> float:
    """Multiply-adds of the matrix products of `work`, those in place among them."""

    def in_place(_, a, b, *rest, **options) -> int:
        return 2 * a[0] * a[1] * b[1]

    products = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        work()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("method", ["exact", "kfac", "kfac-reduce", "tkfac", "foof"])
def test_flops_are_those_that_are_done(method: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(24, 300),
        nn.Tanh(),
        nn.Linear(300, 5),
    ).double()
    data = (torch.randn(60, 2, 8, 8, dtype=torch.float64), None)
    layers = ["0", "6"] if method == "exact" else None
    forms = {method: fl.ExactBlock(form="dense")} if method == "exact" else [method]
    said = fl.estimate(model, data, fl.Categorical(), forms, layers=layers)

    def work() -> None:
        stats = fl.collect(model, data, fl.Categorical(), layers=layers)
        for layer in stats.values():
            if method == "exact":
                fl.ExactBlock(form="dense")(layer).to_dense()
            else:
                fl.approximators()[method](layer)

    assert said.flops == pytest.approx(counted_flops(work), rel=0.1)


def test_dense_matrices_are_counted_where_they_are_asked_for() -> None:
    model, data = nn.Linear(30, 20), (torch.zeros(50, 30), None)
    plain = fl.estimate(model, data, fl.Gaussian(), ["kfac"])
    formed = fl.estimate(model, data, fl.Gaussian(), ["kfac"], dense=True)
    assert plain.dense_bytes == 0
    assert formed.dense_bytes == 4 * (20 * 31) ** 2
    assert formed.peak_bytes > plain.peak_bytes + formed.dense_bytes


def test_streaming_holds_two_runs_at_most() -> None:
    model = nn.Linear(3, 2)
    said = fl.estimate(model, (torch.zeros(50_000, 3), None), fl.Gaussian(), ["kfac"])
    assert said.collection.run == 4000
    few = fl.estimate(model, (torch.zeros(8000, 3), None), fl.Gaussian(), ["kfac"])
    assert said.streamed_bytes == pytest.approx(few.streamed_bytes, rel=0.01)
    assert said.streamed_bytes < said.peak_bytes


def test_sums_over_columns_are_streamed_with_one_column() -> None:
    model, data = nn.Linear(3, 20), (torch.zeros(50_000, 3), None)
    one = fl.estimate(model, data, fl.Gaussian(), ["kfac"])
    all_of_them = fl.estimate(model, data, fl.Gaussian(), ["kfac", "tkfac"])
    run, number = one.collection.run, 4
    assert one.plans["weight"].column_bytes == 50_000 * (4 + 20) * number
    fewer = all_of_them.streamed_bytes - all_of_them.result_bytes
    fewer -= one.streamed_bytes - one.result_bytes
    assert fewer == pytest.approx(2 * run * 19 * 20 * number)


def test_the_form_of_the_exact_block_is_what_is_counted() -> None:
    model = nn.Sequential(nn.Linear(400, 100)).double()
    data = (torch.randn(30, 400, dtype=torch.float64), None)

    def said(form: str, budget: str = "90 GiB") -> Any:
        methods = {"exact": fl.ExactBlock(form=form)}
        return fl.estimate(model, data, fl.Gaussian(), methods, fl.MonteCarlo(1), budget)

    dense = said("dense").plans["0"].dense_bytes
    assert said("dense").peak_bytes > dense > 100 * said("auto").peak_bytes
    assert said("gram").peak_bytes == said("auto").peak_bytes
    assert not said("dense", "100 MiB").fits
    assert "GiB" in said("dense", "100 MiB").advice


def test_a_stream_of_methods_that_hold_samples_holds_them_all() -> None:
    model, data = nn.Linear(3, 20), (torch.zeros(50_000, 3), None)
    held = fl.estimate(model, data, fl.Gaussian(), ["mini-block"])
    assert held.streamed_bytes >= held.statistics_bytes
    tight = held.peak_bytes - 1
    said = fl.estimate(model, data, fl.Gaussian(), ["mini-block"], budget=tight)
    assert "fisherlab.approximate" not in said.advice


def test_an_output_that_collect_refuses_is_refused() -> None:
    model, data = nn.Linear(3, 1), (torch.rand(5, 3), None)
    with pytest.raises(ValueError, match="one class"):
        fl.estimate(model, data, fl.Categorical(), ["kfac"])


def test_output_gradients_are_cut_into_pieces_that_fit_the_budget(monkeypatch) -> None:
    collect = importlib.import_module("fisherlab.statistics.collect")
    model = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 40)).double()
    data = (torch.rand(30, 3, dtype=torch.float64), None)
    monkeypatch.setattr(collect, "PIECE_BYTES", 30 * 90 * 8 * 7)  # seven columns
    pieces = list(collect.stream(model, data, fl.Gaussian()))
    sizes = [piece["0"].samples.columns for piece in pieces]
    assert sizes == [7] * 5 + [5]
    monkeypatch.undo()
    whole = fl.collect(model, data, fl.Gaussian())["0"]
    total = sum(float(piece["0"].samples.squared_norms().sum()) for piece in pieces)
    assert total == pytest.approx(float(whole.samples.squared_norms().sum()))


def multiplied(work: Any) -> float:
    """Return the multiply-adds that matrix products of some work take."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


# N, T, d_out, d_in: tables of positions are smaller than matrices, and larger.
SHARED = [(8, 4, 16, 60), (12, 3, 40, 90), (16, 2, 64, 64), (6, 16, 24, 50), (30, 9, 8, 20)]


@pytest.mark.parametrize(("n", "t", "o", "i"), SHARED)
def test_shared_layers_are_counted_by_the_way_that_is_taken(
    n: int, t: int, o: int, i: int
) -> None:
    """No less than a tenth and no more than ten times what is multiplied."""
    stats = cases.layer_statistics(cases.shared(v=1, n=n, t=t, o=o, i=i))
    for name in ("kpsvd", "kpsvd-2", "kpsvd-3"):
        method = fl.approximators()[name]
        done = multiplied(lambda method=method: method(stats))
        assert 0.1 * done < counted(stats.samples, method).building() < 10 * done
    blocks, w = fl.MiniBlock()(stats), cases.normal(1, o, i)
    done = multiplied(lambda: blocks.solve(w, 0.1))
    assert 0.1 * done < counted(stats.samples, fl.MiniBlock()).solve().flops < 10 * done
