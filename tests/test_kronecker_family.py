"""Laws of the Kronecker family, each against its dense definition."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherlab as fl
from fisherlab.operators import Dense, FactoredMiniBlocks, KroneckerEigen, KroneckerSum
from fisherlab.statistics.network import join_examples
from tests import cases
from tests.oracles import assert_close, second_moment_block

F64 = torch.float64
SAMPLES = {
    "outer": cases.outer(2, 9, 3, 4),
    "one position, few": cases.outer(1, 2, 4, 3),
    "shared": cases.shared(2, 5, 3, 3, 4),
}
GENERAL = {**SAMPLES, "matrices": cases.matrices(2, 6, 3, 2)}
FAST = fl.DenseSVD()


def dense_block(statistics):
    return second_moment_block(statistics.example_gradients(), statistics.count)


def error(op, dense):
    return float((op.to_dense() - dense).norm())


def each(samples):
    return pytest.mark.parametrize("samples", samples.values(), ids=samples)


@given(
    v=st.integers(1, 3),
    n=st.integers(1, 8),
    o=st.integers(1, 4),
    i=st.integers(1, 4),
    t=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_errors_are_ordered(v, n, o, i, t, seed):
    made = cases.outer(v, n, o, i, seed) if t == 1 else cases.shared(v, n, t, o, i, seed)
    statistics = cases.layer_statistics(made)
    dense = dense_block(statistics)
    slack = 1e-9 * float(dense.norm())
    products = {
        name: error(fl.approximators()[name](statistics), dense)
        for name in ("kfac", "kfac-reduce", "tkfac", "shampoo", "foof", "cg-fac")
    }
    ranks = [error(fl.KPSVD(k, FAST)(statistics), dense) for k in (1, 2, 3)]
    assert ranks[0] <= min(products.values()) + slack
    assert ranks[2] <= ranks[1] + slack <= ranks[0] + 2 * slack
    corrected = error(fl.KFACCorrected(solver=FAST)(statistics), dense)
    assert ranks[1] <= corrected + slack
    assert corrected <= products["kfac"] + slack
    assert error(fl.EKFAC()(statistics), dense) <= products["kfac"] + slack
    assert error(fl.TEKFAC()(statistics), dense) <= products["tkfac"] + slack


def autoencoder():
    """A small network trained for a few steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 6), nn.Tanh()
        )
        model = model.append(nn.Linear(6, 8)).double()
    x = cases.normal(60, 8, seed=1).sigmoid()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(x), x).backward()
        optimiser.step()
    return model, x


def test_errors_are_ordered_on_a_trained_network():
    model, x = autoencoder()
    stats = fl.collect(model, (x, x), fl.Bernoulli())
    names = ["kfac", "kfac-corrected", "kpsvd", "kpsvd-2", "kpsvd-3", "tkfac", "ekfac"]
    ds = fl.compare(stats, names, metrics=["frobenius_error"])
    error = ds.frobenius_error
    for better, worse in [
        ("kpsvd", "kfac"),
        ("kpsvd", "tkfac"),
        ("kpsvd-2", "kfac-corrected"),
        ("kfac-corrected", "kfac"),
        ("kpsvd-2", "kpsvd"),
        ("kpsvd-3", "kpsvd-2"),
        ("ekfac", "kfac"),
    ]:
        assert (
            error.sel(approximator=better) <= error.sel(approximator=worse) + 1e-9
        ).all()
    assert (error.sel(approximator="kfac") > 1e-3).any()


@each(GENERAL)
@pytest.mark.parametrize("method", [fl.EKFAC(), fl.TEKFAC()])
def test_corrected_eigenvalues_are_the_diagonal_in_the_basis(method, samples):
    statistics = cases.layer_statistics(samples)
    if isinstance(method, fl.EKFAC) and statistics.inputs is None:
        with pytest.raises(fl.NeedsSharedForm):
            method(statistics)
        return
    op, dense = method(statistics), dense_block(statistics)
    basis = torch.kron(op.row_basis, op.column_basis)
    assert_close(op.entries.flatten(), (basis.T @ dense @ basis).diagonal())
    missing = float(dense.norm()) ** 2 - float(op.entries.norm()) ** 2
    assert error(op, dense) ** 2 == pytest.approx(missing, abs=1e-9 * missing)
    assert op.trace() == pytest.approx(float(dense.trace()))


@each(SAMPLES)
def test_tekfac_has_the_eigenvectors_of_the_partial_traces(samples):
    statistics = cases.layer_statistics(samples)
    op = fl.TEKFAC()(statistics)
    rows, cols = fl.TKFAC()(statistics).terms[0]
    for basis, factor in ((op.row_basis, rows), (op.column_basis, cols)):
        turned = basis.T @ factor @ basis
        assert_close(turned, torch.diag(turned.diagonal()), atol=1e-10)


@each(GENERAL)
@pytest.mark.parametrize("method", [fl.EKFAC(keep_basis=True), fl.TEKFAC(keep_basis=True)])
def test_a_kept_basis_is_that_of_the_operator_before(method, samples):
    statistics = cases.layer_statistics(samples)
    if statistics.inputs is None and isinstance(method, fl.EKFAC):
        return
    half = join_examples([statistics])
    before = method(cases.layer_statistics(type(samples)(*(2 * t for t in held(samples)))))
    after = method(half, previous=before)
    assert torch.equal(after.row_basis, before.row_basis)
    basis = torch.kron(before.row_basis, before.column_basis)
    dense = dense_block(statistics)
    assert_close(after.entries.flatten(), (basis.T @ dense @ basis).diagonal())
    fresh = method(statistics)
    assert error(after, dense) == pytest.approx(
        float(dense.norm() ** 2 - after.entries.norm() ** 2) ** 0.5, rel=1e-6
    )
    assert isinstance(fresh, KroneckerEigen)


def held(samples):
    if hasattr(samples, "stored"):
        return (samples.stored,)
    return samples.inputs, samples.gradients


@each(GENERAL)
def test_tkfac_keeps_the_partial_traces_and_is_half_a_power_step(samples):
    statistics = cases.layer_statistics(samples)
    o, i = statistics.weight_shape
    block = dense_block(statistics).view(o, i, o, i)
    rows = torch.einsum("aibi->ab", block)
    cols = torch.einsum("oaob->ab", block)
    expected = torch.kron(rows, cols) / rows.trace()
    assert_close(fl.TKFAC()(statistics).to_dense(), expected)
    named = fl.approximators.by_name(["tnt"])["tnt"](statistics)
    assert_close(named.to_dense(), expected)


@each(GENERAL)
def test_shampoo_is_the_root_of_the_partial_traces_and_bounds_the_block(samples):
    statistics = cases.layer_statistics(samples)
    d = statistics.example_gradients().flatten(0, 1)
    rows = torch.einsum("noi,npi->op", d, d) / statistics.count
    cols = torch.einsum("noi,noj->ij", d, d) / statistics.count
    op = fl.Shampoo()(statistics)
    found_rows, found_cols = op.terms[0]
    assert_close(found_rows @ found_rows, rows)
    assert_close(found_cols @ found_cols, cols)
    rank = int(torch.linalg.matrix_rank(d).max())
    gap = rank**0.5 * op.to_dense() - dense_block(statistics)
    assert float(torch.linalg.eigvalsh(gap)[0]) >= -1e-9 * op.trace()


@each(SAMPLES)
def test_foof_is_the_input_factor_of_kfac(samples):
    statistics = cases.layer_statistics(samples)
    rows, cols = fl.FOOF()(statistics).terms[0]
    assert torch.equal(rows, torch.eye(len(rows), dtype=F64))
    assert_close(cols, fl.KFAC()(statistics).terms[0][1])


def test_foof_is_exact_for_a_linear_layer_under_a_unit_gaussian():
    model, x = nn.Linear(3, 2).double(), cases.normal(7, 3)
    stats = fl.collect(model, (x, None), fl.Gaussian())["weight"]
    assert_close(fl.FOOF()(stats).to_dense(), dense_block(stats))


def test_kfac_is_exact_for_one_datum():
    model, x = autoencoder()
    stats = fl.collect(model, (x[:1], x[:1]), fl.Bernoulli())
    for layer in stats.values():
        assert_close(fl.KFAC()(layer).to_dense(), dense_block(layer), rtol=1e-9)
        assert_close(fl.EKFAC()(layer).to_dense(), dense_block(layer), rtol=1e-9)


class Linear(nn.Module):
    """A deep linear network on several positions, with or without pooling in front."""

    def __init__(self, pooled):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.pooled = pooled

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden.mean(1) if self.pooled else hidden)


@pytest.mark.parametrize("pooled", [False, True])
def test_kfac_is_exact_for_deep_linear_networks_under_a_gaussian(pooled):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Linear(pooled).double()
    stats = fl.collect(model, (cases.normal(6, 5, 3), None), fl.Gaussian(0.5))
    sharing = "reduce" if pooled else "expand"
    for layer in stats.values():
        found = fl.KFAC(sharing)(layer).to_dense()
        assert_close(found, dense_block(layer), rtol=1e-9)


def test_kflr_and_kfc_are_other_names_of_kfac():
    chosen = fl.approximators.by_name(["kflr", "kfc"])
    assert set(chosen.values()) == {fl.KFAC()}


STREAMED = ["ekfac", "tekfac", "tkfac", "shampoo", "foof", "cg-fac", "kfac", "kpsvd-2"]


@pytest.mark.parametrize("sizes", [(10,), (3, 1, 6)])
def test_streams_give_what_held_statistics_give(sizes):
    model = cases.LAYERS["conv strided padded"].make()
    data = [(part, None) for part in cases.normal(10, 2, 3, 4).split(sizes)]
    found = fl.approximate(model, data, fl.Categorical(), STREAMED, chunk_size=4)
    stats = fl.collect(model, data, fl.Categorical())
    for name, method in fl.approximators.by_name(STREAMED).items():
        for block, layer in stats.items():
            expected = method(layer)
            assert_close(found[name][block].to_dense(), expected.to_dense(), rtol=1e-8)
            assert found[name][block].provenance.examples == 10


# Averages


def test_the_average_of_kronecker_sums_is_factor_wise_with_signs_aligned():
    one = KroneckerSum(tuple(_term(s) for s in (0, 1)), (3, 2))
    other = KroneckerSum(tuple(_term(s) for s in (2, 3)), (3, 2))
    flipped = KroneckerSum(tuple((-g, -a) for g, a in other.terms), (3, 2))
    for new in (other, flipped):
        assert_close(fl.average(one, new, 1.0).to_dense(), one.to_dense())
        assert_close(fl.average(one, new, 0.0).to_dense(), other.to_dense())
    mixed, again = fl.average(one, other, 0.3), fl.average(one, flipped, 0.3)
    assert_close(mixed.to_dense(), again.to_dense())
    near = KroneckerSum(tuple((1.01 * g, 1.01 * a) for g, a in one.terms), (3, 2))
    rows, _ = fl.average(one, near, 0.9).terms[1]
    assert_close(rows, (0.9 + 0.1 * 1.01) * one.terms[1][0])


def _term(seed, sign=1):
    """Two symmetric factors, or with sign -1 two skew ones."""
    both = cases.normal(3, 3, seed=seed), cases.normal(2, 2, seed=seed + 50)
    return tuple(one + sign * one.T for one in both)


def test_symmetric_and_skew_pairs_are_not_averaged_into_an_asymmetric_matrix():
    """Under weight sharing the second pair may be skew at one step and not at the next."""
    even = KroneckerSum((_term(0), _term(1)), (3, 2))
    odd = KroneckerSum((_term(0), _term(1, -1)), (3, 2))
    more = KroneckerSum((_term(0), _term(2, -1)), (3, 2))
    for old, new in [(even, odd), (odd, even), (odd, more)]:
        dense = fl.average(old, new, 0.7).to_dense()
        assert_close(dense, dense.T)
    assert_close(fl.average(even, odd, 0.7).to_dense(), odd.to_dense())
    assert_close(fl.average(odd, odd, 0.7).to_dense(), odd.to_dense())


def test_a_pair_that_appears_or_vanishes_is_kept_or_fades():
    long = KroneckerSum(tuple(_term(s) for s in (0, 1)), (3, 2))
    short = KroneckerSum((_term(0),), (3, 2))
    assert_close(fl.average(short, long, 0.5).to_dense(), long.to_dense())
    faded = fl.average(long, short, 0.5).terms[1]
    assert_close(faded[0], 0.5 * long.terms[1][0])


def test_the_average_of_eigen_forms_is_the_best_diagonal_in_the_new_basis():
    parts = [cases.layer_statistics(cases.outer(2, 9, 3, 4, seed=s)) for s in (0, 5)]
    old, new = (fl.EKFAC()(part) for part in parts)
    found = fl.average(old, new, 0.7)
    whole = 0.7 * old.to_dense() + 0.3 * new.to_dense()
    basis = torch.kron(new.row_basis, new.column_basis)
    assert_close(found.entries.flatten(), (basis.T @ whole @ basis).diagonal())
    same = fl.average(new, fl.EKFAC(keep_basis=True)(parts[0], previous=new), 0.7)
    assert same.trace() == pytest.approx(0.7 * new.trace() + 0.3 * old.trace())


@pytest.mark.parametrize("name", ["exact", "mini-block", "diagonal"])
def test_plain_averages_are_averages_of_the_matrices(name):
    parts = [cases.layer_statistics(cases.outer(2, 9, 3, 4, seed=s)) for s in (0, 5)]
    old, new = (fl.approximators()[name](part) for part in parts)
    found = fl.average(old, new, 0.7)
    assert_close(found.to_dense(), 0.7 * old.to_dense() + 0.3 * new.to_dense())
    assert not isinstance(found, FactoredMiniBlocks)
    again = fl.average(found, new, 0.5)
    assert_close(again.to_dense(), 0.5 * found.to_dense() + 0.5 * new.to_dense())


def test_what_cannot_be_averaged_says_so():
    statistics = cases.layer_statistics(SAMPLES["outer"])
    kfac, ekfac = fl.KFAC()(statistics), fl.EKFAC()(statistics)
    with pytest.raises(ValueError, match="one method"):
        fl.average(kfac, ekfac, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fl.average(kfac, kfac, 1.5)
    cg = fl.CGFAC()(statistics)
    with pytest.raises(ValueError, match=r"no average.*average=0"):
        fl.average(cg, cg, 0.5)
    with pytest.raises(ValueError, match="same weight"):
        fl.average(Dense(torch.eye(2), (1, 2)), Dense(torch.eye(2), (2, 1)), 0.5)


# B-KFAC


def test_a_low_rank_average_is_exact_while_the_rank_is_enough():
    parts = [cases.layer_statistics(cases.outer(2, 3, 4, 5, seed=s)) for s in (0, 3, 6)]
    factors = [fl.KFAC()(part).terms[0] for part in parts]
    op, (rows, cols) = None, factors[0]
    for part, (new_rows, new_cols) in zip(parts, factors, strict=True):
        rows, cols = 0.8 * rows + 0.2 * new_rows, 0.8 * cols + 0.2 * new_cols
        op = fl.BKFAC(rank=5, decay=0.8)(part, previous=op)
        assert_close(op.to_dense(), torch.kron(rows, cols))
        assert_close(op.row_basis.T @ op.row_basis, torch.eye(4, dtype=F64), atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_low_rank_average_is_cut_to_its_largest_values(rank):
    statistics = cases.layer_statistics(cases.outer(2, 9, 4, 5))
    op = fl.BKFAC(rank)(statistics)
    for factor, basis in zip(
        fl.KFAC()(statistics).terms[0], (op.row_basis, op.column_basis), strict=True
    ):
        _, vectors = torch.linalg.eigh(factor)
        best = vectors[:, -rank:] @ vectors[:, -rank:].T
        assert_close(basis @ basis.T, best, atol=1e-9)
        assert basis.shape == (len(factor), rank)
    dense = op.to_dense()
    eye = torch.eye(20, dtype=F64)
    assert_close(op.inverse(0.1).to_dense(), torch.linalg.inv(dense + 0.1 * eye), rtol=1e-9)
    twice = op.inverse(0.1).inverse(0.3)
    expected = torch.linalg.inv(torch.linalg.inv(dense + 0.1 * eye) + 0.3 * eye)
    assert_close(twice.to_dense(), expected, rtol=1e-9)


def test_a_low_rank_operator_answers_like_its_dense_block():
    statistics = cases.layer_statistics(cases.outer(2, 9, 4, 5))
    low = fl.BKFAC(2)(statistics)
    for op in (low, low.inverse(0.2)):
        dense, w = Dense(op.to_dense(), (4, 5)), cases.normal(2, 4, 5)
        assert_close(op @ w, dense @ w)
        assert_close(op.solve(w, 0.3), dense.solve(w, 0.3))
        assert_close(op.diagonal(), dense.diagonal())
        assert_close(op.eigenvalues(), dense.eigenvalues(), atol=1e-10)
        assert op.trace() == pytest.approx(dense.trace())
        assert op.frobenius_norm() == pytest.approx(dense.frobenius_norm())
        other = fl.KPSVD(2)(statistics)
        assert op.inner(other) == pytest.approx(dense.inner(other))
    with pytest.raises(fl.IndefiniteError):
        low.inverse(0.0)
    with pytest.raises(ValueError, match="Kronecker terms"):
        low.inverse(fl.Factored(0.1))


# SINGD and IKFAC


def iterated(method, statistics, steps):
    op = None
    for _ in range(steps):
        op = method(statistics, previous=op)
    return op


@each(SAMPLES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_ikfac_ends_at_kfac_with_damped_factors(momentum, samples):
    statistics = cases.layer_statistics(samples)
    method = fl.SINGD(damping=0.3, rate=0.1, momentum=momentum, adaptive=False)
    op = iterated(method, statistics, 400)
    eyes = [torch.eye(n, dtype=F64) for n in statistics.weight_shape]
    rows, cols = fl.KFAC()(statistics).terms[0]
    damped = torch.kron(rows + 0.3 * eyes[0], cols + 0.3 * eyes[1])
    assert_close(op.to_dense(), damped, rtol=1e-8)
    w = cases.normal(2, *statistics.weight_shape)
    expected = torch.linalg.solve(damped, w.flatten(1).T).T.view(w.shape)
    assert_close(op.solve(w, 0.0), expected, rtol=1e-8)


def test_singd_couples_its_factors_at_the_fixed_point():
    statistics = cases.layer_statistics(SAMPLES["outer"])
    op = iterated(fl.SINGD(damping=0.3, rate=0.1), statistics, 500)
    rows, cols = fl.KFAC()(statistics).terms[0]
    c, k = op.row_root, op.column_root
    for one, factor, other, moment in ((c, rows, k, cols), (k, cols, c, rows)):
        scale = (other.T @ moment @ other).diagonal().mean()
        share = (other.T @ other).diagonal().mean()
        eye = torch.eye(len(one), dtype=F64)
        gap = scale * one.T @ factor @ one + 0.3 * share * one.T @ one - eye
        assert float(gap.norm()) < 1e-7


def test_one_step_of_singd_is_its_rule():
    statistics = cases.layer_statistics(SAMPLES["outer"])
    rows, cols = fl.KFAC()(statistics).terms[0]
    op = fl.SINGD(damping=0.3, rate=0.1)(statistics)
    eye = torch.eye(3, dtype=F64)
    moved = (cols.trace() / 4 * rows + 0.3 * eye - eye) / 2
    assert_close(op.row_root, eye - 0.1 * moved)
    assert_close(op.row_momentum, moved)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_normalised_steps_are_stable_at_any_scale_and_end_where_the_others_do(momentum):
    samples = SAMPLES["outer"]
    statistics = cases.layer_statistics(replace(samples, inputs=1e3 * samples.inputs))
    plain = fl.SINGD(0.3, 0.1, momentum, adaptive=False)
    with pytest.raises(fl.NumericalError, match=r"SINGD in block .* take normalised=True"):
        iterated(plain, statistics, 400)
    op = iterated(replace(plain, normalised=True), statistics, 400)
    rows, cols = fl.KFAC()(statistics).terms[0]
    eyes = [torch.eye(n, dtype=F64) for n in statistics.weight_shape]
    damped = torch.kron(rows + 0.3 * eyes[0], cols + 0.3 * eyes[1])
    assert_close(op.to_dense(), damped, rtol=1e-6)


def test_a_diagonal_structure_stays_diagonal():
    statistics = cases.layer_statistics(SAMPLES["outer"])
    method = fl.SINGD(0.3, 0.1, 0.0, adaptive=False, structure="diagonal")
    op = iterated(method, statistics, 400)
    rows, _ = fl.KFAC()(statistics).terms[0]
    assert_close(op.formed.terms[0][0], torch.diag(rows.diagonal() + 0.3), rtol=1e-8)


def test_inverse_factors_answer_like_their_dense_block():
    statistics = cases.layer_statistics(SAMPLES["outer"])
    op = iterated(fl.SINGD(0.3, 0.1), statistics, 20)
    dense, w = Dense(op.to_dense(), (3, 4)), cases.normal(2, 3, 4)
    assert_close(op @ w, dense @ w)
    assert_close(op.diagonal(), dense.diagonal())
    assert_close(op.eigenvalues(), dense.eigenvalues())
    assert op.frobenius_norm() == pytest.approx(dense.frobenius_norm())
    assert op.inner(fl.KPSVD(2)(statistics)) == pytest.approx(
        dense.inner(fl.KPSVD(2)(statistics))
    )
    for damping in (0.0, 0.4):
        assert_close(op.solve(w, damping), dense.solve(w, damping), rtol=1e-9)
    with pytest.raises(ValueError, match="Kronecker terms"):
        op.solve(w, fl.Factored(0.1))


# KFRA


def dense_network(*activations, widths=(3, 4, 4, 2), bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        pieces = []
        for at, activation in enumerate(activations):
            pieces += [nn.Linear(*widths[at : at + 2], bias=bias), activation]
        return nn.Sequential(*pieces, nn.Linear(*widths[-2:], bias=bias)).double()


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS.values(), ids=cases.LIKELIHOODS)
@pytest.mark.parametrize("bias", [True, False])
def test_kfra_is_exact_for_one_example(likelihood, bias):
    model, x = dense_network(nn.Tanh(), nn.Softplus(), bias=bias), cases.normal(1, 3)
    stats = fl.collect(model, (x, None), likelihood)
    found = fl.kfra(model, (x, None), likelihood)
    assert list(found) == list(stats)
    for name, layer in stats.items():
        assert_close(found[name].to_dense(), dense_block(layer), rtol=1e-9)


def test_kfra_is_its_recursion_written_out():
    model, x = dense_network(nn.Tanh(), nn.Sigmoid()), cases.normal(6, 3)
    first, _, second, _, last = model
    s_first = first(x)
    s_second = second(s_first.tanh())
    p = last(s_second.sigmoid()).softmax(1)
    g_last = sum(torch.diag(q) - torch.outer(q, q) for q in p) / 6
    d_second = s_second.sigmoid() * (1 - s_second.sigmoid())
    d_first = 1 - s_first.tanh() ** 2
    g_second = (last.weight.T @ g_last @ last.weight) * (d_second.T @ d_second) / 6
    g_first = (second.weight.T @ g_second @ second.weight) * (d_first.T @ d_first) / 6
    a = torch.cat([x, torch.ones(6, 1)], 1).double()
    found = fl.kfra(model, (x, None), fl.Categorical())
    assert_close(found["0"].to_dense(), torch.kron(g_first, a.T @ a / 6))
    assert_close(found["2"].terms[0][0], g_second)
    assert all(p.grad is None for p in model.parameters())


def test_kfra_equals_kfac_for_deep_linear_networks_under_a_gaussian():
    model, x = dense_network(nn.Identity(), nn.Identity()), cases.normal(6, 3)
    stats = fl.collect(model, (x, None), fl.Gaussian(2.0))
    found = fl.kfra(model, (x, None), fl.Gaussian(2.0))
    for name, layer in stats.items():
        assert_close(found[name].to_dense(), fl.KFAC()(layer).to_dense())


def test_kfra_names_what_it_does_not_understand():
    softmax = dense_network(nn.Softmax(1), nn.Tanh())
    with pytest.raises(fl.UnsupportedModelError, match="Softmax"):
        fl.kfra(softmax, (cases.normal(4, 3), None), fl.Gaussian())
    with pytest.raises(fl.UnsupportedModelError, match="examples, features"):
        fl.kfra(dense_network(nn.Tanh()), (cases.normal(4, 2, 3), None), fl.Gaussian())


# The improved empirical Fisher


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS.values(), ids=cases.LIKELIHOODS)
def test_improved_empirical_weights_examples_by_their_output_gradient(likelihood):
    model, x, y = cases.data(cases.LAYERS["linear"], likelihood)
    plain = fl.collect(model, (x, y), likelihood, fl.Empirical())["0"]
    found = fl.collect(model, (x, y), likelihood, fl.ImprovedEmpirical())["0"]
    output = model(x).detach()
    norms = likelihood.gradient(output, y).flatten(1).norm(dim=1)
    expected = plain.example_gradients() / norms[:, None, None]
    assert_close(found.example_gradients(), expected)


def test_improved_empirical_is_the_gauss_newton_matrix_of_one_output():
    model, x, y = cases.data(cases.LAYERS["linear"], fl.Gaussian())
    single = nn.Sequential(*model, nn.Linear(3, 1).double())
    y = y[:, :1]
    found = fl.collect(single, (x, y), fl.Gaussian(), fl.ImprovedEmpirical())
    exact = fl.collect(single, (x, y), fl.Gaussian(), fl.Exact())
    for name in found:
        assert_close(dense_block(found[name]), dense_block(exact[name]))


def test_an_example_without_gradient_adds_nothing():
    model, x = nn.Linear(3, 1).double(), cases.normal(4, 3)
    y = model(x).detach() + torch.tensor([[1.0], [0.0], [2.0], [3.0]])
    found = fl.collect(model, (x, y), fl.Gaussian(), fl.ImprovedEmpirical())["weight"]
    assert torch.isfinite(found.gradients).all()
    assert float(found.gradients[0, 1].norm()) == 0.0
