"""The main job: it plans before it works, says what it leaves out, and ends."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.analysis.allowances import Allowance, cut, parse_time
from fisherlab.approximators import KFAC, ExactBlock
from fisherlab.operators import FactoredFisher, FactoredMiniBlocks, KroneckerSum, Partition
from fisherlab.problems import descriptions
from fisherlab.problems.problem import drawn
from fisherlab.report import sizes
from fisherlab.report.analysis import analyse, count_phases
from fisherlab.report.config import ReportConfig
from fisherlab.report.folder import Phases
from fisherlab.report.sizes import fitted
from fisherlab.samples import OuterSamples
from tests.benchmarks.reports import measure, stand_in

METHODS = ["exact", "kfac", "kpsvd-2", "mini-block", "diagonal"]


def made(columns=3, examples=12, o=5, i=20):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, i, generator=generator, dtype=torch.float64)
    shape = columns, examples, o
    return OuterSamples(inputs, torch.randn(shape, generator=generator).double())


def collected():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 12, generator=generator).double()
    y = torch.randint(0, 3, (20,), generator=generator)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    stats = fl.collect(model, (x, y), fl.Categorical())
    return stats, fl.mean_gradient(model, (x, y), fl.Categorical())


def compared(**options):
    stats, gradient = collected()
    damping = fl.RelativeDamping(1.0)
    return fl.compare(stats, METHODS, damping=damping, gradient=gradient, **options)


@pytest.mark.parametrize("time", ["1 h", 0.01, 1e-3, 1e-6])
def test_what_a_time_leaves_in_is_the_same_number_and_the_rest_says_why(time):
    whole, part = compared(), compared(time=time)
    for name in ("frobenius_error", "direction_cosine", "inverse_error"):
        kept = part[name].notnull()
        same = np.isclose(part[name], whole[name], rtol=1e-9, equal_nan=True)
        assert bool((~kept | same).all())
        said = part["status"].astype(str).str.contains("left out for size")
        assert bool((kept | said).all())
    assert parse_time("1 h") == 3600
    assert part["frobenius_error"].notnull().all() or time != "1 h"


def test_more_time_never_leaves_out_more():
    layers = {"a": made(), "b": made(o=40, i=60)}
    methods = {"kfac": KFAC(), "exact": ExactBlock()}
    parts = ("matrix", "gradient", "damping")
    counts = [
        len(cut(layers, methods, parts, Allowance(flops, 1e9)).reasons)
        for flops in (1e2, 1e4, 1e6, 1e12)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    heavy = cut(layers, methods, parts, Allowance(1e12, 1e3)).reasons
    assert any("--budget" in why for why in heavy.values())


@pytest.mark.parametrize("text", ["", "5 days", "..", "0 s", -1])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="time="):
        parse_time(text)


def test_mini_blocks_of_few_examples_are_solved_in_the_examples():
    samples = made()
    blocks = FactoredMiniBlocks(Partition.by_row((5, 20)), samples, 12)
    w = torch.randn(4, 5, 20, generator=torch.Generator().manual_seed(1)).double()
    formed = FactoredMiniBlocks(blocks.partition, samples, 12).to_dense()
    dense = formed + 0.3 * torch.eye(100, dtype=torch.float64)
    expected = torch.linalg.solve(dense, w.flatten(1).T).T.view_as(w)
    torch.testing.assert_close(blocks.solve(w, 0.3), expected)
    torch.testing.assert_close(blocks.solve(w[0], 0.3), expected[0])
    assert "formed" not in vars(blocks)


def test_large_exact_blocks_are_solved_by_products(monkeypatch):
    exact = FactoredFisher(made(o=9), 12)
    w = torch.randn(9, 20, generator=torch.Generator().manual_seed(1)).double()
    expected = exact.solve(w, 0.1)
    monkeypatch.setattr("fisherlab.operators.factored.FACTORED", 0)
    monkeypatch.setattr("fisherlab.operators.factored.ROUNDS", 0)
    other = FactoredFisher(made(o=9), 12)
    monkeypatch.setattr(FactoredFisher, "inverse", None)
    assert other.iterates
    torch.testing.assert_close(other.solve(w, 0.1), expected)


def test_the_smallest_eigenvalue_of_a_sum_of_low_rank_is_found():
    generator = torch.Generator().manual_seed(0)

    def moment(n, rank):
        rows = torch.randn(n, rank, generator=generator, dtype=torch.float64)
        return rows @ rows.T / rank

    terms = ((moment(70, 5), moment(60, 5)), (-moment(70, 3), moment(60, 2)))
    total = KroneckerSum(terms, (70, 60))  # above the size that is formed
    dense = total.to_dense()
    smallest = torch.linalg.eigvalsh(dense)[0]
    assert total.smallest_eigenvalue == pytest.approx(float(smallest), rel=1e-6)
    # Its smallest is 0, for which ARPACK's relative test fails.
    psd = KroneckerSum(terms[:1] + terms[:1], (70, 60))
    assert abs(psd.smallest_eigenvalue) < 1e-7 * psd.frobenius_norm()


@pytest.mark.parametrize(
    "error", [RuntimeError("LAPACK"), MemoryError("no room"), ArithmeticError("zero")]
)
def test_a_method_that_fails_in_one_layer_does_not_end_the_table(error):
    def failing(statistics, previous=None):
        if statistics.name == "2":
            raise error
        return KFAC()(statistics)

    stats, _ = collected()
    ds = fl.compare(stats, {"mine": failing, "kfac": KFAC()}, damping=0.1)
    assert ds.frobenius_error.sel(layer="0").notnull().all()
    status = str(ds.status.sel(layer="2", approximator="mine").item())
    assert "mine of '2'" in status
    assert str(error) in status
    assert bool(ds.inverse_error.sel(layer="2", approximator="kfac").notnull())


def test_examples_are_drawn_at_random_and_alike_for_one_seed():
    x = torch.arange(1000)
    part, other = drawn((x, x), 100, 3)
    assert part is other
    assert not torch.equal(part, x[:100])
    assert torch.equal(part, drawn((x, x), 100, 3)[0])
    assert not torch.equal(part, drawn((x, x), 100, 4)[0])
    assert drawn((x, x), 2000)[0] is x


def test_a_report_is_fitted_to_its_time_and_budget():
    problem = fl.problems.load("digits", examples=300)
    config = ReportConfig(steps=2, examples=200)
    roomy = fitted(problem, replace(config, time="10 h", budget="64 GiB"))
    assert (roomy.examples, roomy.told) == (200, ())
    assert roomy.fisher == fl.Exact()
    tight = fitted(problem, replace(config, time="0.001 s"))
    assert tight.examples < 200
    assert any("--time" in sentence for sentence in tight.told)
    small = fitted(problem, replace(config, budget="600 KiB"))
    assert small.examples < 200
    tiny = fitted(problem, replace(config, budget="10 KiB"))  # outputs of 80 bytes
    assert (roomy.at_once, roomy.batch) == (256, 64)
    assert (tiny.at_once, tiny.batch) == (8, 16)


SIX = (
    "digits",
    "digits-vit",
    "prose-gpt",
    "faces-autoencoder",
    "curves-autoencoder",
    "cifar10-subset-resnet8",
)


@pytest.mark.parametrize("name", SIX)
def test_the_comparison_of_a_problem_ends_in_numbers_and_statuses(name, monkeypatch):
    monkeypatch.setattr(sizes, "_FEWEST_LOSSES", 16)
    monkeypatch.setattr(descriptions, "_PROBLEMS", dict(descriptions._PROBLEMS))
    stand_in(name)
    problem = fl.problems.load(name)
    config = ReportConfig(
        problem=name, steps=1, examples=16, checkpoints=(0,), time="1 s", quiet=True
    )
    with Phases(count_phases(config), quiet=True) as phase:
        found = analyse(problem, config, fitted(problem, config), phase).results
    assert found.sizes["layer"] == len(list(fl.blocks(problem.model)))
    told = found.status.astype(str) != "ok"
    assert (found.frobenius_error.notnull() | told).all()
    assert found.frobenius_error.notnull().any()


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_the_report_of_a_problem_ends_with_a_page(name):
    found = measure(name, examples=16, checkpoints="5")
    assert found["code"] == 0, found
    assert found["page_bytes"] > 10_000
    assert found["peak_bytes"] < 6 * 2**30
