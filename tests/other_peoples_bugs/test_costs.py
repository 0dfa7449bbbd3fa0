"""What other people waited for: work that grew with the precision, the form or the size."""

import importlib
import subprocess
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fisherlab as fl
from fisherlab.plots.style import new_axes
from fisherlab.samples import OuterSamples, SharedSamples
from fisherlab.statistics import Statistics

collecting = importlib.import_module("fisherlab.statistics.collect")
KRYLOV = ["kpsvd", "deflation", "kfac-corrected"]
FAST = ("exact", "kfac", "ekfac", "mini-block", "cg-fac", "quasi-diagonal", "lanczos-2")


def every(*registers):
    """Every registered name; those that are like others in the slow suite."""
    names = dict.fromkeys(name for register in registers for name in register)
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in names]


def convolution():
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(20, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def sequence():
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 30))


SHARED = {"convolution": (convolution, (16, 3, 8, 8)), "sequence": (sequence, (16, 9, 20))}


def shared_layer(kind):
    """Statistics of a shared layer in float32, and the same numbers in float64."""
    torch.manual_seed(0)
    net, shape = SHARED[kind][0](), SHARED[kind][1]
    data = (torch.randn(shape), None)
    single = fl.collect(net, data, fl.Categorical(), fl.MonteCarlo(1), layers=["2"])["2"]
    wide = replace(
        single, inputs=single.inputs.double(), gradients=single.gradients.double()
    )
    return single, wide


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("name", KRYLOV)
def test_shared_layers_converge_in_float32(kind, name):
    """In float32 it took 1,000 products and did not converge where float64 took 8."""
    single, wide = (fl.approximators()[name](s) for s in shared_layer(kind))
    assert single.converged
    assert wide.converged
    restart, pairs = 8, 2  # rounding may cost a restart of a pair, not the limit of 1,000
    assert single.iterations <= 2 * wide.iterations + restart * pairs
    torch.testing.assert_close(
        single.singular_values.double(),
        wide.singular_values,
        rtol=0,
        atol=1e-5 * float(wide.singular_values[0]),
    )


def multiply_adds(question):
    """Return the multiply-adds of matrix products in answering a question."""
    with FlopCounterMode(display=False) as counted:
        question()
    return counted.get_total_flops() // 2


def layer(inputs, outputs, examples, positions, columns=1, dtype=torch.float64):
    """Statistics of random numbers: o × i weights, used at some positions."""
    torch.manual_seed(0)
    net = nn.Linear(inputs, outputs, bias=False).to(dtype)
    at = () if positions == 1 else (positions,)
    data = torch.randn(examples, *at, inputs, dtype=dtype), None
    fisher = fl.MonteCarlo(columns)
    return fl.collect(net, data, fl.Gaussian(), fisher, compress=False)["weight"]


SIZES = {"one position": (24, 20, 16, 1), "few": (24, 20, 8, 3), "many": (8, 6, 4, 50)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", every(fl.approximators()))
def test_an_error_in_float32_takes_no_more_products_than_in_float64(name, size):
    """One mini-block error took 45 s and 14 GiB in float32, .02 s in float64."""
    taken = {}
    for dtype in (torch.float64, torch.float32):
        stats = layer(*SIZES[size], dtype=dtype)
        exact, approx = fl.ExactBlock()(stats), fl.approximators()[name](stats)
        error = lambda one=exact, other=approx: fl.metrics.frobenius_error(one, other)
        taken[dtype] = multiply_adds(error)
    fresh = fl.ExactBlock()(layer(*SIZES[size]))  # a method may keep its table for the norm
    norm = multiply_adds(fresh.frobenius_norm)
    assert taken[torch.float32] <= 1.5 * (taken[torch.float64] + norm)


@pytest.mark.parametrize("name", every(fl.approximators()))
def test_inner_products_multiply_no_sample_by_sample(name):
    """`cg-fac`, `mini-block-shared` and `quasi-diagonal` took seconds, KFAC .02."""
    stats = layer(60, 50, 40, 1)
    exact, approx = fl.ExactBlock()(stats), fl.approximators()[name](stats)
    o, i, n = 50, 60, 40
    terms = 10 if name == "low-rank" else 4  # ten vectors are ten products with F
    limit = terms * n * (o * o + i * i + n * (o + i))
    assert multiply_adds(lambda: exact.inner(approx)) <= limit


@pytest.mark.parametrize("name", ["kfac", "ekfac", "diagonal", "low-rank"])
def test_inverses_multiply_no_eigenvector_by_eigenvector(name):
    """KFAC's damped inverse beside the exact one took p products for M samples."""
    stats = layer(60, 50, 10, 1)
    exact = fl.ExactBlock()(stats).inverse(1e-2)
    approx = fl.approximators()[name](stats).inverse(1e-2)
    o, i, n = 50, 60, 10
    limit = 4 * n * (o * o * i + i * i * o + n * o * i)
    for question in (lambda: exact.inner(approx), lambda: approx.inner(exact)):
        assert multiply_adds(question) <= limit


@pytest.mark.parametrize("other", ["same", "by input", "mean"])
@pytest.mark.parametrize("name", every(["exact"], fl.approximators()))
def test_inner_products_with_blocks_of_other_samples_are_dense_ones(name, other):
    """Mini-blocks of other statistics were formed whole, other partitions p × p."""
    stats, more = layer(5, 4, 6, 3, columns=2), layer(5, 4, 9, 3)
    approx = {"exact": fl.ExactBlock(), **fl.approximators()}[name](stats)
    method = {
        "same": fl.MiniBlock(),
        "by input": fl.MiniBlock(partition=fl.ByInput()),
        "mean": fl.MiniBlock(statistic="scaled_mean_gradient"),
    }[other]
    blocks = method(more)
    dense = blocks.to_dense(), approx.to_dense()
    scale = float(dense[0].norm() * dense[1].norm())
    for found in (blocks.inner(approx), approx.inner(blocks)):
        assert found == pytest.approx(float((dense[0] * dense[1]).sum()), abs=1e-12 * scale)


SHAPES = [(5, 60, 50, 2), (3, 6, 5, 40), (4, 3, 40, 9)]  # N, o, i, T


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_over_positions_take_the_cheaper_order(shape, columns):
    """⟨F, G ⊗ A⟩ formed every example's matrix where pairs of positions cost a tenth."""
    n, o, i, t = shape
    stats = layer(i, o, n, t, columns)
    samples = stats.samples
    rows, cols = (torch.randn(k, k, dtype=torch.float64) for k in (o, i))
    rows, cols = rows + rows.T, cols + cols.T
    pairs = n * t * (columns * o * (o + t) + i * (i + t))
    matrices = n * columns * o * i * (t + o + i)
    formed = samples.matrices().flatten(0, 1)
    asked = {
        "inner": lambda: samples.kronecker_inner(rows, cols),
        "rows": lambda: samples.row_side(cols),
        "columns": lambda: samples.column_side(rows),
    }
    right = {
        "inner": (formed * (rows @ formed @ cols)).sum().item(),
        "rows": (formed @ cols @ formed.mT).sum(0),
        "columns": (formed.mT @ rows @ formed).sum(0),
    }
    for question, answer in asked.items():
        torch.testing.assert_close(answer(), right[question])
        assert multiply_adds(answer) <= 1.2 * min(pairs, matrices)
    turned = (rows.T @ formed @ cols).square().sum(0)
    torch.testing.assert_close(samples.rotated_squares(rows, cols), turned)
    whole = columns * n
    tables = (n * t) ** 2 * (i + columns**2 * o), whole * o * i * (t + whole)
    assert multiply_adds(samples.squared_norm) <= 1.2 * min(tables)
    gram = formed.flatten(1) @ formed.flatten(1).T
    assert samples.squared_norm() == pytest.approx(float(gram.square().sum()))


def test_a_norm_forms_every_matrix_once(monkeypatch):
    """Matrices were formed again for every pair of chunks, at 18 times the products."""
    monkeypatch.setattr("fisherlab.samples.base.CHUNK_BYTES", 20_000)
    samples = layer(20, 30, 12, 40).samples
    m, p, t = 12, 600, 40
    assert multiply_adds(samples.squared_norm) <= m * p * (t + m)


def test_samples_stay_one_object_in_another_precision():
    """Two operators of the same samples had different ones once cast."""
    stats = layer(4, 3, 5, 1, dtype=torch.float32)
    blocks = fl.ExactBlock()(stats), fl.MiniBlock()(stats)
    casts = [block.to(torch.float64) for block in blocks]
    assert casts[0].samples is casts[1].samples
    assert isinstance(casts[0].samples, OuterSamples | SharedSamples)


HALVES = [torch.bfloat16, torch.float16]


def in_half(dtype, positions):
    """Statistics held in half precision, and the same numbers in float64."""
    half = layer(5, 4, 9, positions, dtype=torch.float32).to(dtype)
    return half, half.to(torch.float64)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", every(fl.approximators(), fl.preconditioners()))
def test_half_statistics_give_what_the_same_numbers_give(name, dtype, positions):
    """`lanczos-2` was the zero operator in bfloat16, and exact solves failed."""
    method = (fl.approximators() | fl.preconditioners())[name]
    half, wide = in_half(dtype, positions)
    op, right = method(half), method(wide)
    w = torch.randn(4, 5).to(dtype)
    close = {"rtol": 0.03, "atol": 0.03}
    for answer in (lambda m, w: m @ w, lambda m, w: m.solve(w, 5.0)):
        found, expected = answer(op, w), answer(right, w.double())
        assert found.dtype == dtype
        scale = float(expected.abs().max())
        torch.testing.assert_close(found.double() / scale, expected / scale, **close)
    block, other = fl.ExactBlock()(half), fl.ExactBlock()(wide)
    for question in (
        lambda m, f: m.frobenius_norm(),
        lambda m, f: f.inner(m),
        lambda m, f: m.inverse(5.0).trace(),
        lambda m, f: float(m.eigenvalues()[0]),
        lambda m, f: fl.metrics.cosine_similarity(f, m),
    ):
        expected = question(right, other)
        assert question(op, block) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compare_of_half_statistics_fills_every_cell(dtype):
    """An error of LAPACK in one method took the whole table down."""
    half, wide = in_half(dtype, 1)
    metrics = ["frobenius_error", "inverse_error"]
    tables = [
        fl.compare(Statistics({"weight": s}, s.provenance), metrics=metrics, damping=0.1)
        for s in (half, wide)
    ]
    assert tables[0].status.values.tolist() == tables[1].status.values.tolist()
    for metric in metrics:
        found, expected = (torch.tensor(table[metric].values) for table in tables)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_many_columns_are_compressed_in_half(dtype):
    net = nn.Linear(5, 4).to(dtype)
    x = torch.randn(6, 5).to(dtype)
    found = fl.collect(net, (x, None), fl.Gaussian(), fl.MonteCarlo(9))["weight"]
    assert found.dtype == dtype
    assert found.samples.columns == 4


def test_several_dampings_of_compare_cost_one_decomposition():
    """Nine dampings took 30 to 60 s where `sweep` took 1.4 s for the same numbers."""
    stats = {"weight": layer(12, 10, 20, 1)}
    stats = Statistics(stats, stats["weight"].provenance)
    gradient = {"weight": torch.randn(10, 12, dtype=torch.float64)}
    asked = {
        "approximators": ["kfac", "ekfac", "mini-block", "diagonal"],
        "metrics": ["inverse_error", "gaussian_kl", "direction_cosine"],
        "gradient": gradient,
    }
    dampings = [10.0**k for k in range(-4, 5)]
    alone = [fl.compare(stats, damping=one, **asked) for one in dampings]
    together = fl.compare(stats, damping=dampings, **asked)
    for level, one in enumerate(alone):
        for metric in asked["metrics"]:
            found = torch.tensor(together[metric].isel(damping=level).values)
            expected = torch.tensor(one[metric].isel(damping=0).values)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    nine = multiply_adds(lambda: fl.compare(stats, damping=dampings, **asked))
    three = multiply_adds(lambda: fl.compare(stats, damping=dampings[::4], **asked))
    assert nine <= 2 * three


def test_many_classes_at_several_positions_are_cut_by_columns(monkeypatch):
    """1,000 classes on one convolution took gigabytes for one pair of examples."""
    monkeypatch.setattr("fisherlab.samples.shared.CHUNK_BYTES", 50_000)
    samples = layer(30, 20, 3, 2, columns=40).samples
    largest = Largest()
    with largest:
        found = samples.squared_norm()
    gram = samples.matrices().flatten(2).flatten(0, 1)
    assert found == pytest.approx(float((gram @ gram.T).square().sum()))
    assert largest.nbytes <= 8 * 120**2  # the table of inner products itself


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made meanwhile."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
        return made


def test_a_pdf_holds_one_picture_of_the_whole_figure_per_colour_bar():
    blocks = (("approximator", "row", "col"), np.eye(4)[None])
    axes = {"approximator": ["exact"], "row": range(4), "col": range(4)}
    tree = {str(k): xr.Dataset({"inverse": blocks}, axes) for k in range(3)}
    figure = fl.plots.inverse_heatmap(xr.DataTree.from_dict(tree))
    ax = fl.plots.heatmap(tree["0"]["inverse"][0])
    for drawn in (figure, ax.figure):
        assert not drawn.findobj(lambda artist: artist.get_rasterized())
    plt.close("all")


def test_a_figure_is_larger_than_renderers_can_draw(tmp_path):
    (file,) = fl.plots.save(new_axes(2.0, 400.0), tmp_path / "tall", formats=["png"])
    with Image.open(file) as picture:
        assert 2**14 < max(picture.size) <= 2**15
    plt.close("all")


MANY_LAYERS = """
import resource, sys, torch, fisherlab as fl
from torch import nn
torch.manual_seed(0)
middle = [m for _ in range(58) for m in (nn.Linear(8, 8), nn.Tanh())]
net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), *middle, nn.Linear(8, 3)).double()
data = torch.randn(40, 8).double(), torch.randint(0, 3, (40,))
names = ["kfac", "diagonal"]
fl.report.of_model(net, data, fl.Categorical(), sys.argv[1], approximators=names)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_the_report_of_many_layers_takes_little_memory(tmp_path):
    command = [sys.executable, "-c", MANY_LAYERS, str(tmp_path / "page")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(told.stdout.split()[-1]) < 1536
    html = (tmp_path / "page" / "report.html").read_text()
    assert "12 of 60 layers are drawn" in html


def test_columns_that_cannot_fit_are_refused_before_they_are_pulled_back(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 300))
    data = torch.randn(20, 4), torch.randint(0, 300, (20,))
    needed = 20 * 300 * 300 * 4
    monkeypatch.setattr(collecting, "PIECE_BYTES", needed // 20)
    pulled, pull = [], collecting.taps.pull
    monkeypatch.setattr(
        collecting.taps, "pull", lambda *a: pulled.append(len(a[2])) or pull(*a)
    )
    with pytest.raises(fl.BudgetError):
        fl.collect(model, data, fl.Categorical(), layers=["2"], budget=needed // 2)
    assert sum(pulled) <= 300 // 10
    # A narrow layer keeps as many columns as outputs, which fit.
    narrow = fl.collect(model, data, fl.Categorical(), layers=["0"], budget=needed // 2)
    assert len(narrow["0"].gradients) == 6


def test_results_larger_than_the_budget_are_refused_before_they_are_summed():
    torch.manual_seed(0)
    model = nn.Linear(4, 500)
    data = torch.randn(6, 4), torch.randint(0, 500, (6,))
    call = (model, data, fl.Categorical(), ["kfac"], fl.MonteCarlo(1))
    with pytest.raises(fl.BudgetError, match="approximate by kfac"):
        fl.approximate(*call, budget=500 * 500 * 4)
    assert fl.approximate(*call, budget=500 * 500 * 5)["kfac"]["weight"].trace() > 0


def test_a_comparison_inverts_no_mini_blocks_beyond_its_budget_to_count_a_solve():
    torch.manual_seed(0)
    data = (torch.randn(12, 150).double(), torch.zeros(12).long())
    model = nn.Sequential(nn.Linear(150, 100), nn.Tanh(), nn.Linear(100, 3)).double()
    stats = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(1), layers=["0"])
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                largest = max(largest, out.nbytes)
            return out

    with Sizes():
        ds = fl.compare(stats, ["mini-block"], damping=0.1, budget="8 MiB")
    assert np.isfinite(ds["solve_flops"].item())
    assert largest <= 8 * 2**20  # the blocks are 18 MB
