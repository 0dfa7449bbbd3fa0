"""Every solver of the best Kronecker sum against numpy's SVD of the rearranged block."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherlab as fl
from fisherlab.approximators import kpsvd_choice as choice
from fisherlab.approximators.kpsvd_choice import choose
from fisherlab.approximators.rearranged import PositionGram, Rearranged
from fisherlab.operators import KroneckerSum
from fisherlab.samples import MatrixSamples, SharedSamples
from fisherlab.statistics.network import Chunks
from tests import cases
from tests.oracles import rearranged, second_moment_block

SOLVERS = {
    "power": fl.Power(),
    "subspace": fl.Subspace(),
    "lanczos": fl.Lanczos(),
    "dense": fl.DenseSVD(),
    "gram": fl.SampleGram(),
    "passes": fl.Passes(),
    "auto": "auto",
}
SAMPLES = {
    "few examples": cases.outer(1, 4, 3, 5),
    "many examples": cases.outer(1, 60, 3, 4),
    "columns": cases.outer(3, 9, 4, 3),
    "one output": cases.outer(1, 7, 1, 4),
    "one input": cases.outer(2, 7, 3, 1),
    "shared": cases.shared(2, 5, 3, 3, 4),
    "matrices": cases.matrices(2, 6, 3, 2),
}


def dense_block(statistics):
    return second_moment_block(statistics.example_gradients(), statistics.count)


def singular_values(statistics):
    whole = rearranged(dense_block(statistics), statistics.weight_shape)
    return np.linalg.svd(whole, compute_uv=False)


def error(op, statistics):
    return float((op.to_dense() - dense_block(statistics)).norm())


def solvable(solver, statistics):
    """SampleGram is for layers used at one position."""
    return not isinstance(solver, fl.SampleGram) or isinstance(
        statistics.samples, cases.OuterSamples
    )


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_rank_is_the_truncated_svd(solver, samples):
    statistics = cases.layer_statistics(samples)
    if not solvable(solver, statistics):
        pytest.skip("needs a layer used at one position")
    values = singular_values(statistics)
    full = int((values > 1e-11 * values[0]).sum())
    slow = isinstance(solver, (fl.Power, fl.Subspace))  # near ties need many iterations
    for rank in {1, 2} if slow else {1, 2, full - 1, full, full + 2} - {0}:
        op = fl.KPSVD(rank, solver)(statistics)
        kept = min(rank, full)
        assert op.converged
        assert len(op.terms) == kept
        np.testing.assert_allclose(
            op.singular_values, values[:kept], rtol=1e-10, atol=1e-10 * values[0]
        )
        tail = float((values[kept:] ** 2).sum()) ** 0.5
        assert error(op, statistics) == pytest.approx(tail, rel=1e-8, abs=1e-7 * values[0])


@given(
    v=st.integers(1, 3),
    n=st.integers(1, 12),
    o=st.integers(1, 4),
    i=st.integers(1, 4),
    t=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_solvers_agree_on_random_shapes(v, n, o, i, t, seed):
    made = cases.outer(v, n, o, i, seed) if t == 1 else cases.shared(v, n, t, o, i, seed)
    statistics = cases.layer_statistics(made)
    values = singular_values(statistics)
    for solver in (fl.Lanczos(), fl.DenseSVD(), fl.SampleGram(), fl.Passes(), "auto"):
        if solvable(solver, statistics):
            op = fl.KPSVD(2, solver)(statistics)
            kept = len(op.terms)
            singular = solver == fl.SampleGram() and n > min(o, i) * (min(o, i) + 1) / 2
            assert op.converged or singular  # tables of more examples than dimensions
            np.testing.assert_allclose(op.singular_values, values[:kept], rtol=1e-8)
            assert np.all(values[kept:2] <= 1e-9 * values[0])


@pytest.mark.parametrize("name", ["power", "subspace", "lanczos", "passes"])
def test_sums_over_samples_are_given_matrices_whose_rows_lie_side_by_side(
    name, monkeypatch
):
    """A batched product by a strided matrix takes up to ten times as long."""
    statistics, given = cases.layer_statistics(cases.shared(2, 5, 3, 3, 4)), []
    for kind in (SharedSamples, MatrixSamples):
        for sums in ("row_side", "column_side"):
            plain = getattr(kind, sums)

            def seen(samples, middle, plain=plain):
                given.append(middle.is_contiguous())
                return plain(samples, middle)

            monkeypatch.setattr(kind, sums, seen)
    fl.KPSVD(2, SOLVERS[name])(statistics)
    assert given
    assert all(given)


def test_singular_tables_of_examples_say_where_they_end_early():
    """More examples than a factor has entries: the weights keep what stands for nothing."""
    statistics = cases.layer_statistics(cases.outer(3, 10, 3, 3, 2240))
    found, exact = (fl.KPSVD(2, s)(statistics) for s in (fl.SampleGram(), fl.DenseSVD()))
    gap = (found.to_dense() - exact.to_dense()).norm() / exact.frobenius_norm()
    assert float(gap) < (1e-8 if found.converged else 1e-5)
    torch.testing.assert_close(found.singular_values, exact.singular_values)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("copies", [2, 3])
def test_tied_singular_values_are_found(solver, copies):
    inputs, gradients = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    samples = cases.OuterSamples(inputs[:copies], gradients[None, :copies])
    statistics = cases.layer_statistics(samples)
    op = fl.KPSVD(copies, solver)(statistics)
    expected = torch.full((copies,), 1 / copies, dtype=torch.float64)
    torch.testing.assert_close(op.singular_values, expected)
    assert error(op, statistics) < 1e-10


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_block_of_rank_one_is_exact_and_a_zero_block_is_zero(solver):
    one = cases.layer_statistics(cases.outer(1, 1, 3, 4))
    op = fl.KPSVD(3, solver)(one)
    assert len(op.terms) == 1
    assert error(op, one) < 1e-10
    zero = cases.layer_statistics(
        cases.OuterSamples(torch.zeros(5, 3).double(), torch.zeros(1, 5, 2).double())
    )
    op = fl.KPSVD(2, solver)(zero)
    assert (op.converged, len(op.terms), op.trace()) == (True, 0, 0.0)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("name", ["few examples", "shared"])
def test_the_leading_factors_are_positive_semidefinite(solver, name):
    statistics = cases.layer_statistics(SAMPLES[name])
    if not solvable(solver, statistics):
        pytest.skip("needs a layer used at one position")
    rows, cols = fl.KPSVD(1, solver)(statistics).terms[0]
    for factor in (rows, cols):
        torch.testing.assert_close(factor, factor.T)
        values = torch.linalg.eigvalsh(factor)
        assert float(values[0]) >= -1e-12 * float(values[-1])
        assert float(values[-1]) > 0


def test_skew_pairs_of_shared_weights_are_kept():
    """One example at two positions gives a skew ⊗ skew pair among the leading ones."""
    found = 0
    for seed in range(20):
        statistics = cases.layer_statistics(cases.shared(1, 1, 2, 3, 3, seed=100 + seed))
        values = singular_values(statistics)
        for solver in (fl.Power(), fl.Lanczos(), fl.DenseSVD(), fl.Passes()):
            op = fl.KPSVD(4, solver)(statistics)
            np.testing.assert_allclose(op.singular_values, values[:4], rtol=1e-7)
            found += sum(float((g + g.T).norm()) < 1e-6 for g, _ in op.terms)
    assert found


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_deflation_equals_the_truncated_svd(samples):
    statistics = cases.layer_statistics(samples)
    for rank in (1, 2, 3):
        deflated = fl.Deflation(rank)(statistics)
        best = fl.KPSVD(rank, fl.DenseSVD())(statistics)
        assert error(deflated, statistics) == pytest.approx(
            error(best, statistics), rel=1e-6, abs=1e-7 * best.frobenius_norm()
        )


def test_a_cap_leaves_a_visible_residual():
    statistics = cases.layer_statistics(cases.outer(1, 40, 5, 6))
    op = fl.KPSVD(2, fl.Power(max_iterations=1))(statistics)
    assert not op.converged
    assert op.residual > 1e-10
    assert op.to_dense().isfinite().all()
    stats = fl.statistics.Statistics({"layer": statistics}, statistics.provenance)
    ds = fl.compare(stats, {"capped": fl.KPSVD(2, fl.Power(max_iterations=1))})
    assert ds.converged.item() == 0
    assert "not converged" in ds.status.item()


def test_the_residual_reported_is_that_of_the_pairs():
    statistics = cases.layer_statistics(cases.outer(1, 40, 5, 6))
    op = fl.KPSVD(1, fl.Power(max_iterations=3))(statistics)
    whole = torch.as_tensor(rearranged(dense_block(statistics), (5, 6)))
    sigma = float(op.singular_values[0])
    # Without clamping (the factors are positive already up to rounding).
    cols = op.terms[0][1].flatten() / sigma**0.5
    images = whole @ cols
    left = images / images.norm()
    residual = float((whole.T @ left - images.norm() * cols).norm()) / sigma
    assert residual == pytest.approx(op.residual, rel=1e-2)


def test_a_warm_start_saves_iterations():
    before = cases.layer_statistics(cases.outer(1, 200, 6, 7))
    inputs, gradients = before.inputs * 1.001, before.gradients
    after = fl.LayerStatistics(before.block, 200, inputs, gradients, positions=200)
    for method in (fl.KPSVD(2, fl.Power()), fl.KPSVD(2, fl.Subspace())):
        cold = method(after)
        warm = method(after, previous=method(before))
        assert warm.iterations < cold.iterations
        torch.testing.assert_close(warm.singular_values, cold.singular_values)


def test_the_published_lanczos_is_off_where_the_sound_one_is_not():
    statistics = cases.layer_statistics(cases.outer(1, 40, 5, 6))
    values = singular_values(statistics)
    paper = fl.approximators()["lanczos-paper"](statistics)
    sound = fl.approximators()["lanczos-2"](statistics)
    np.testing.assert_allclose(sound.singular_values, values[:2], rtol=1e-10)
    assert abs(float(paper.singular_values[1]) / values[1] - 1) > 1e-2
    assert not paper.converged


def test_auto_counts_its_costs():
    few = Rearranged(cases.outer(1, 20, 60, 70), 20)
    assert isinstance(choose(few, 1), fl.SampleGram)
    small = Rearranged(cases.outer(1, 5000, 3, 3), 5000)
    assert isinstance(choose(small, 1), fl.DenseSVD)
    short = Rearranged(cases.shared(1, 2, 3, 60, 70), 2)
    assert isinstance(choose(short, 1), PositionGram)
    long = Rearranged(cases.shared(1, 2, 200, 60, 70), 2)
    assert isinstance(choose(long, 1), fl.Lanczos)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh()
        )
        return model.append(nn.Linear(4, 3)).double()


def batches(sizes):
    x = cases.normal(sum(sizes), 1, 3, 3, seed=7)
    return [(part, None) for part in x.split(sizes)]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 8])
def test_passes_through_a_stream_find_what_held_samples_give(rank, depth):
    model, data = network(), batches([4, 1, 5])
    method = {"passes": fl.KPSVD(rank, fl.Passes(depth=depth, max_iterations=500))}
    streamed = fl.approximate(model, data, fl.Categorical(), method)["passes"]
    stats = fl.collect(model, data, fl.Categorical())
    for name, op in streamed.items():
        held = fl.KPSVD(rank, fl.DenseSVD())(stats[name])
        assert op.converged
        assert op.provenance.examples == 10
        torch.testing.assert_close(op.singular_values, held.singular_values)
        torch.testing.assert_close(op.to_dense(), held.to_dense(), rtol=1e-6, atol=1e-9)


def test_passes_merge_parts_of_the_data():
    stats = [cases.layer_statistics(cases.outer(2, n, 3, 4, seed=n)) for n in (4, 6)]
    method = fl.KPSVD(2, fl.Passes())
    states = [method.accumulate(None, part) for part in stats]
    while (following := method.next_pass(method.merge(*states))) is not None:
        states = [method.accumulate(following, part) for part in stats]
    merged = method.finish(method.merge(*states))
    whole = fl.statistics.network.join_examples(stats)
    expected = fl.KPSVD(2, fl.DenseSVD())(whole)
    torch.testing.assert_close(merged.to_dense(), expected.to_dense(), rtol=1e-7, atol=1e-9)


def test_passes_never_hold_samples():
    statistics = cases.layer_statistics(cases.outer(1, 500, 3, 4))
    method = fl.KPSVD(1, fl.Passes(depth=2))
    state = method.accumulate(None, statistics)
    held = sum(t.numel() for t in (state.block, *state.sums.tensors))
    assert held <= 2 * (3 * 3 + 4 * 4)


STREAMED = {
    "kpsvd": fl.KPSVD(),
    "kpsvd-3": fl.KPSVD(3),
    "deflation": fl.Deflation(3),
    "kfac-corrected": fl.KFACCorrected(),
    "kfac-corrected-2": fl.KFACCorrected(2),
    "by passes": fl.Deflation(2, fl.Passes(depth=4)),
    "corrected by passes": fl.KFACCorrected(1, fl.Passes()),
}


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("limit", [0, 1500])
def test_large_streams_go_over_to_passes_and_find_the_same(name, limit, monkeypatch):
    monkeypatch.setattr(choice, "HELD_BYTES", limit)
    model, data, method = network(), batches([4, 1, 5]), STREAMED[name]
    held = []
    note = Chunks.add
    monkeypatch.setattr(
        Chunks, "add", lambda self, s: held.append(note(self, s)) or held[-1]
    )
    streamed = fl.approximate(model, data, fl.Categorical(), {"it": method})["it"]
    if limit == 0:  # nothing is kept beyond its own chunk
        assert all(len(state.runs) == 1 for state in held)
    stats = fl.collect(model, data, fl.Categorical())
    for block, op in streamed.items():
        whole = replace(method, solver=fl.DenseSVD())(stats[block])
        assert op.converged
        assert op.provenance.examples == 10
        assert len(op.terms) == len(whole.terms)
        torch.testing.assert_close(op.to_dense(), whole.to_dense(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(op.singular_values, whole.singular_values)


@pytest.mark.parametrize("name", ["kpsvd-3", "deflation", "kfac-corrected"])
def test_parts_that_are_held_merge_with_parts_that_are_not(name, monkeypatch):
    stats = [cases.layer_statistics(cases.outer(2, n, 3, 4, seed=n)) for n in (4, 60)]
    monkeypatch.setattr(choice, "HELD_BYTES", stats[0].nbytes)
    method = STREAMED[name]
    for order in ((0, 1), (1, 0)):
        states = [method.accumulate(None, stats[k]) for k in order]
        assert sum(isinstance(state, Chunks) for state in states) == 1
        while (following := method.next_pass(method.merge(*states))) is not None:
            states = [method.accumulate(following, stats[k]) for k in order]
        merged = method.finish(method.merge(*states))
        whole = fl.statistics.network.join_examples(stats)
        expected = replace(method, solver=fl.DenseSVD())(whole)
        torch.testing.assert_close(
            merged.to_dense(), expected.to_dense(), rtol=1e-7, atol=1e-9
        )


def test_a_stream_without_a_remainder_is_kfac_alone(monkeypatch):
    monkeypatch.setattr(choice, "HELD_BYTES", 0)
    one = cases.layer_statistics(cases.outer(1, 1, 3, 4))
    method = fl.KFACCorrected()
    state = method.accumulate(None, one)
    while (following := method.next_pass(state)) is not None:
        state = method.accumulate(following, one)
    found = method.finish(state)
    assert len(found.terms) == 1
    torch.testing.assert_close(found.to_dense(), fl.KFAC()(one).to_dense())


@pytest.mark.parametrize("solver", ["auto", fl.Lanczos(), fl.SampleGram(), fl.Power()])
def test_no_solver_allocates_the_rearranged_block(solver, monkeypatch):
    o, i = 40, 50
    statistics = cases.layer_statistics(cases.outer(1, 30, o, i))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(t.numel() for t in found if isinstance(t, torch.Tensor))
            return out

    with Watch():
        op = fl.KPSVD(2, solver)(statistics)
    assert isinstance(op, KroneckerSum)
    assert max(sizes) < o * o * i * i / 20


@pytest.mark.parametrize("seed", [3, 19, 42, 88, 101, 154, 177, 190])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("solver", ["auto", fl.SampleGram()], ids=["auto", "gram"])
def test_pairs_are_found_where_few_examples_dominate(seed, rank, solver):
    """Tables whose entries span 20 decades: columns of a basis are rounding errors."""
    torch.manual_seed(seed)
    inputs = torch.cat([torch.randn(60, 8), torch.ones(60, 1)], 1).double()
    gradients = torch.exp(4 * torch.randn(60, 1).double()) * torch.randn(60, 16).double()
    stats = cases.layer_statistics(cases.OuterSamples(inputs, gradients[None]))
    best = fl.KPSVD(rank, fl.DenseSVD())(stats)
    found = fl.KPSVD(rank, solver)(stats)
    if solver != "auto" and not found.converged:
        return  # it says so, and "auto" goes on by another solver
    assert found.converged
    torch.testing.assert_close(found.singular_values, best.singular_values)
    rest = (found.to_dense() - best.to_dense()).norm() / best.to_dense().norm()
    assert float(rest) < 1e-6
