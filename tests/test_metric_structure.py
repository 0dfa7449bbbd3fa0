"""Metrics of one matrix, of subspaces and of networks, against formed matrices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import fisherlab as fl
from fisherlab import metrics
from fisherlab.metrics import BelowFloor, pairs, spectra, structure
from fisherlab.metrics.pairs import noise_floors
from fisherlab.operators import Dense, Diagonal, FactoredFisher, KroneckerSum, Partition
from tests import cases, oracles
from tests.cases import METHODS, normal
from tests.oracles import assert_close

SAMPLES = {
    "outer": cases.outer(2, 6, 3, 4),
    "outer, many columns": cases.outer(9, 5, 3, 4),
    "shared": cases.shared(2, 4, 3, 3, 2),
    "matrices": cases.matrices(2, 5, 3, 2),
}
FORMS = pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
SPACES = pytest.mark.parametrize("space", ["gram", "dense"])
few = settings(max_examples=15, phases=[Phase.generate])


def fisher(samples, space="auto"):
    block = FactoredFisher(samples, samples.examples, form=space)
    return block, oracles.second_moment_block(samples.matrices(), samples.examples)


@FORMS
def test_the_kronecker_spectrum_is_that_of_the_rearrangement(samples):
    block, dense = fisher(samples)
    expected = np.linalg.svd(oracles.rearranged(dense, block.weight_shape))[1]
    found = metrics.kronecker_spectrum(block)
    size = min(len(found), len(expected))
    # Values through Gram tables are roots: below 1e-7 of the largest they are rounding.
    assert_close(found[:size] ** 2, expected[:size] ** 2, 1e-10, atol=1e-13)
    assert float(found[size:].sum() + expected[size:].sum()) < 1e-6 * expected[0]
    assert_close(found.norm(), dense.norm(), 1e-10)
    assert_close(metrics.kronecker_ratio(block), expected[1] / expected[0], 1e-8)


def test_both_ways_to_the_kronecker_spectrum_agree(monkeypatch):
    samples = cases.outer(2, 30, 5, 4)
    block, _ = fisher(samples)
    packed = metrics.kronecker_spectrum(block)
    monkeypatch.setattr(type(samples), "packed_is_cheaper", False)
    gram = metrics.kronecker_spectrum(fisher(cases.outer(2, 30, 5, 4))[0])
    assert len(gram) != len(packed)
    assert_close(gram[:10] ** 2, packed**2, 1e-10)


@FORMS
def test_kpsvd_reaches_the_kronecker_tail_and_kfac_does_not_beat_it(samples):
    stats = cases.layer_statistics(samples)
    exact = fl.ExactBlock()(stats)
    for rank in (1, 2):
        reached = metrics.frobenius_error(exact, fl.KPSVD(rank=rank)(stats))
        assert_close(metrics.kronecker_tail(exact, rank) ** 2, reached**2, 1e-9, atol=1e-12)
    if stats.is_shared:
        kfac = metrics.scale_optimal_error(exact, fl.KFAC()(stats))
        assert metrics.kronecker_tail(exact) <= kfac + 1e-12


def test_a_kronecker_spectrum_that_is_too_large_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(structure, "DENSE_NUMBERS", 10)
    monkeypatch.setattr(structure, "GRAM_EXAMPLES", 5)
    with pytest.raises(fl.UnsupportedMetric, match=r"kronecker_spectrum.*KPSVD"):
        metrics.kronecker_spectrum(fisher(SAMPLES["shared"])[0])
    with pytest.raises(fl.UnsupportedMetric, match="at most 5 examples"):
        metrics.kronecker_spectrum(fisher(cases.outer(1, 6, 30, 40))[0])


@FORMS
@pytest.mark.parametrize("way", ["by_row", "by_kernel", "by_label"])
def test_masses_are_sums_over_the_entries(samples, way):
    block, dense = fisher(samples)
    o, i = block.weight_shape
    groups = {
        "by_row": lambda: Partition.by_row((o, i)),
        "by_kernel": lambda: Partition.by_kernel((o, i), i - 1, bias=True),
        "by_label": lambda: Partition.by_label((o, i), torch.arange(o * i).view(o, i) % 2),
    }[way]()
    listed = [list(row) for group in groups.groups for row in group]
    kept = oracles.mini_blocks(dense, listed)
    squared = kept.square().sum() / dense.square().sum()
    assert_close(metrics.squared_mass(block, groups), squared, 1e-10)
    assert_close(metrics.squared_mass(Dense(dense, (o, i)), groups), squared, 1e-10)
    absolute = kept.abs().sum() / dense.abs().sum()
    assert_close(metrics.absolute_mass(block, groups), absolute, 1e-10)
    inside = oracles.mini_blocks(torch.ones_like(dense), listed).sum() / dense.numel()
    assert_close(metrics.entry_share(groups), inside, 1e-12)


def test_a_partition_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"squared_mass.*\(2, 2\)"):
        metrics.squared_mass(Diagonal(torch.ones(2, 3)), Partition.by_row((2, 2)))


@FORMS
@SPACES
@pytest.mark.parametrize("name", ["kfac", "kpsvd-2", "mini-block", "diagonal", "ekfac"])
def test_subspaces_are_those_of_the_dense_matrices(samples, space, name):
    stats = cases.layer_statistics(samples)
    exact = fl.ExactBlock(space)(stats)
    try:
        approx = METHODS[name](stats)
    except fl.NeedsSharedForm:
        return
    matrices = exact.to_dense(), approx.to_dense()
    bases = [torch.linalg.eigh(matrix).eigenvectors[:, -2:] for matrix in matrices]
    expected = (bases[0].T @ bases[1]).square().sum() / 2
    assert_close(metrics.subspace_overlap(exact, approx, 2), expected, 1e-8)
    assert metrics.subspace_overlap(exact, approx, 10**6) == 1.0


def test_a_tied_subspace_is_refused():
    tied = Diagonal(torch.tensor([[3.0, 1.0, 1.0, 0.5]], dtype=torch.float64))
    assert metrics.subspace_overlap(tied, tied, 1) == 1.0
    with pytest.raises(fl.UnsupportedMetric, match="eigenvalues 2 and 3 are tied"):
        metrics.subspace_overlap(tied, tied, 2)
    with pytest.raises(ValueError, match="k=0"):
        metrics.subspace_overlap(tied, tied, 0)


@pytest.mark.parametrize("name", METHODS)
@FORMS
def test_decompositions_rebuild_the_matrix(name, samples):
    try:
        operator = METHODS[name](cases.layer_statistics(samples))
    except fl.NeedsSharedForm:
        return
    basis, dense = spectra.decomposed(operator), operator.to_dense()
    vectors = basis.vectors(torch.arange(len(basis.values))).flatten(1)
    eye = torch.eye(len(dense), dtype=torch.float64)
    assert_close(vectors @ vectors.T, torch.eye(len(vectors)), 1e-8)
    rebuilt = vectors.T @ torch.diag(basis.values - basis.rest) @ vectors
    assert_close(rebuilt + basis.rest * eye, dense, 1e-9)
    assert_close(basis.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0), 1e-9)
    w = normal(3, *operator.weight_shape)
    assert_close(basis.rotate(w), w.flatten(1) @ vectors.T, 1e-9, atol=1e-12)


def test_large_blocks_without_a_basis_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(spectra, "DENSE_ROWS", 5)
    dense = Dense(torch.eye(6), (2, 3))
    with pytest.raises(fl.UnsupportedMetric, match=r"damping_curve.*frobenius_error"):
        metrics.damping_curve(dense, dense, [1.0])
    metrics.damping_curve(Diagonal(torch.ones(2, 3)), Diagonal(torch.ones(2, 3)), [1.0])


def test_the_spectrum_of_a_long_sum_is_refused_by_name(monkeypatch):
    eye = torch.eye(2)
    monkeypatch.setattr("fisherlab.operators.kronecker.DENSE_ROWS", 1)
    several = KroneckerSum(((eye, eye), (eye, eye)), (2, 2))
    with pytest.raises(fl.UnsupportedMetric, match=r"spectrum_error.*rank 4 of 4"):
        metrics.spectrum_error(Diagonal(torch.ones(2, 2)), several)
    with pytest.raises(fl.UnsupportedMetric, match=r"log_spectrum_distance"):
        metrics.log_spectrum_distance(Diagonal(torch.ones(2, 2)), several, 1.0)


@pytest.mark.parametrize("method", [fl.Deflation(2), fl.KFACCorrected()])
def test_the_spectrum_error_of_a_long_sum_needs_the_rank_of_f_alone(method, monkeypatch):
    stats = cases.layer_statistics(cases.outer(2, 5, 7, 8))  # rank 10 of 56
    exact, approx = fl.ExactBlock()(stats), method(stats)
    f, g = (torch.linalg.svdvals(one.to_dense()) for one in (exact, approx))
    expected = torch.linalg.vector_norm(f - g) / torch.linalg.vector_norm(f)
    monkeypatch.setattr("fisherlab.operators.kronecker.DENSE_ROWS", 1)
    assert_close(metrics.spectrum_error(exact, approx), expected, 1e-7)


def test_the_spectral_error_of_large_blocks_is_the_norm_of_the_difference(monkeypatch):
    monkeypatch.setattr(spectra, "DENSE_DIFFERENCE", 3)
    for samples in SAMPLES.values():
        stats = cases.layer_statistics(samples)
        exact, approx = fl.ExactBlock()(stats), fl.Diagonal()(stats)
        f, g = exact.to_dense(), approx.to_dense()
        expected = torch.linalg.matrix_norm(f - g, 2) / torch.linalg.matrix_norm(f, 2)
        assert_close(metrics.spectral_error(exact, approx), expected, 1e-10)
    same = Dense(exact.to_dense(), exact.weight_shape)
    assert isinstance(metrics.spectral_error(exact, same), BelowFloor)


def test_a_small_divergence_is_measured_or_bounded_never_noise(monkeypatch):
    f = Dense(torch.diag(normal(6).square() + 1), (2, 3))
    for size in (1e-3, 1e-6, 1e-9):
        shift = f.matrix.diagonal() + 1.0
        g = Dense(f.matrix + size * torch.eye(6), (2, 3))
        expected = 0.25 * float((size / shift).square().sum())  # to second order
        assert_close(metrics.gaussian_kl(f, g, 1.0), expected, 3 * size + 1e-6)
        back = metrics.gaussian_kl(f, g, 1.0, reverse=True)
        assert_close(back, expected, 3 * size + 1e-6)
    monkeypatch.setattr(pairs, "RESIDUAL_ROWS", 5)
    for value in (metrics.gaussian_kl(f, g, 1.0), metrics.stein_divergence(f, g, 1.0)):
        assert isinstance(value, BelowFloor)
        assert 0 < value < 1e-9
    whitened = metrics.whitened_error(fisher(SAMPLES["outer"])[0], _near(), 1.0)
    assert isinstance(whitened, BelowFloor)


def _near():
    block, dense = fisher(SAMPLES["outer"])
    return Dense(dense * (1 + 1e-12), block.weight_shape)


@settings(few)
@given(
    st.integers(1, 3), st.integers(2, 7), st.sampled_from(["outer", "shared", "matrices"])
)
def test_noise_floors_are_half_the_distance_of_the_halves(v, n, form):
    samples = {
        "outer": cases.outer(v, n, 3, 2),
        "shared": cases.shared(v, n, 2, 3, 2),
        "matrices": cases.matrices(v, n, 3, 2),
    }[form]
    block, dense = fisher(samples)
    found = noise_floors(block, splits=4, seed=3)
    each = torch.einsum("vnp,vnq->npq", *[samples.matrices().flatten(2)] * 2)
    generator = torch.Generator().manual_seed(3)
    for floor in found:
        order = torch.randperm(n, generator=generator)
        a, b = each[order[: n // 2]].mean(0), each[order[n // 2 :]].mean(0)
        expected = float((a - b).norm() / dense.norm()) / 2
        assert_close(floor**2, expected**2, 1e-10, atol=1e-14)


def test_noise_floors_of_many_examples_add_up_blocks_of_the_table(monkeypatch):
    whole = noise_floors(fisher(cases.outer(2, 9, 3, 2))[0], splits=3)
    monkeypatch.setattr("fisherlab.samples.outer.KEPT_EXAMPLES", 4)
    monkeypatch.setattr("fisherlab.samples.outer.GRAM_ROWS", 4)
    pieces = noise_floors(fisher(cases.outer(2, 9, 3, 2))[0], splits=3)
    assert_close(torch.tensor(pieces), torch.tensor(whole), 1e-6)


def test_noise_floors_estimate_the_distance_to_the_limit():
    """Of repeated draws the mean square floor is the mean square distance."""
    generator = torch.Generator().manual_seed(0)
    floors_seen, distances = [], []
    limit = torch.eye(2, dtype=torch.float64)
    for _ in range(60):
        x = torch.randn(200, 2, generator=generator, dtype=torch.float64)
        samples = fl.operators.FactoredFisher(
            cases.OuterSamples(torch.ones(200, 1, dtype=torch.float64), x[None]), 200
        )
        floors_seen.append(np.mean(np.square(noise_floors(samples, splits=4))))
        f = samples.to_dense()
        distances.append(float((f - limit).norm() / f.norm()) ** 2)
    assert_close(np.mean(floors_seen) / np.mean(distances), 1.0, 0.25)


def test_too_few_examples_have_no_noise_floor():
    block, _ = fisher(cases.outer(1, 1, 2, 2))
    assert math.isnan(noise_floors(block)[0])
    zero = FactoredFisher(cases.OuterSamples(torch.zeros(4, 1), torch.zeros(1, 4, 1)), 4)
    assert math.isnan(noise_floors(zero)[0])
    with pytest.raises(ValueError, match="splits=0"):
        noise_floors(block, splits=0)


@pytest.fixture(scope="module")
def network():
    def model():
        layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)]
        return nn.Sequential(*layers).double()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model()
    return fl.collect(made, (normal(6, 3), None), fl.Categorical(), compress=False)


@pytest.mark.parametrize("panel", [1, 10**6])
def test_couplings_are_norms_of_the_blocks_between_layers(network, panel, monkeypatch):
    monkeypatch.setattr(structure, "PANEL_NUMBERS", panel)
    squares, table = metrics.cross_squares(network), metrics.coupling(network)
    blocks = {(a, b): fl.cross_block(network, a, b) for a in network for b in network}
    for r, row in enumerate(network):
        for c, column in enumerate(network):
            size = blocks[row, column].norm()
            assert_close(squares[r, c], size**2, 1e-10)
            scale = (blocks[row, row].norm() * blocks[column, column].norm()) ** 0.5
            assert_close(table[r, c], size / scale, 1e-10)
    whole = fl.full_matrix(network)
    assert_close(squares.sum(), whole.values.square().sum(), 1e-10)
    shares = metrics.layer_table(whole.values, whole.offsets, "squared_mass")
    assert_close(shares, squares / squares.sum(), 1e-10)
    means = metrics.layer_table(whole.values, whole.offsets)
    assert_close(means[0, 1], blocks["0", "2"].abs().mean(), 1e-12)
    diagonal = float(squares.diagonal().sum() / squares.sum())
    assert_close(metrics.band_mass(squares, 0), diagonal, 1e-12)
    far = squares[0, 2] + squares[2, 0]
    assert_close(metrics.band_mass(squares, 1), 1 - far / squares.sum(), 1e-12)
    assert metrics.band_mass(squares, 2) == 1.0


def test_couplings_of_shared_and_matrix_layers_are_those_of_the_blocks():
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Categorical())
    stats = fl.collect(model, (x, y), fl.Categorical(), compress=False)
    squares = metrics.cross_squares(stats)
    assert_close(squares[0, 1], fl.cross_block(stats, "0", "3").norm() ** 2, 1e-10)
    assert_close(squares[0, 0], fl.cross_block(stats, "0", "0").norm() ** 2, 1e-10)


def test_compressed_columns_cannot_be_coupled():
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 5)).double()
    stats = fl.collect(model, (normal(6, 3), None), fl.Categorical())
    with pytest.raises(ValueError, match=r"'0'.*compress=False"):
        metrics.coupling(stats)


def test_gamma_is_least_along_the_exact_direction():
    block, dense = fisher(SAMPLES["outer"])
    v = normal(*block.weight_shape, seed=9)
    p = dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype)
    best = block.solve(v, 0.1)
    least = float(v.flatten() @ torch.linalg.solve(p, v.flatten())) ** -0.5
    assert_close(metrics.gamma(block, best, v, 0.1), least, 1e-10)
    assert_close(metrics.gamma(block, -3 * best, v, 0.1), least, 1e-10)
    for seed in range(5):
        other = normal(*block.weight_shape, seed=seed)
        assert metrics.gamma(block, other, v, 0.1) >= least * (1 - 1e-12)
    across = torch.zeros_like(v)
    across[0, 0], across[0, 1] = v[0, 1], -v[0, 0]
    assert metrics.gamma(block, across, v, 0.1) > 1e10 * least


def test_scale_and_shape_add_up():
    stats = cases.layer_statistics(SAMPLES["outer"])
    exact, approx = fl.ExactBlock()(stats), fl.KFAC()(stats)
    whole = metrics.frobenius_error(exact, approx) ** 2
    shape = metrics.scale_optimal_error(exact, approx) ** 2
    scale = metrics.optimal_scale(exact, approx)
    share = (approx.frobenius_norm() / exact.frobenius_norm()) ** 2
    assert_close(shape + (scale - 1) ** 2 * share, whole, 1e-12)


def test_metrics_take_network_operators(network):
    whole = fl.full_matrix(network)
    exact = Dense(whole.values, (len(whole.values), 1))
    blocks = fl.block_diagonal("kfac", network)
    f, g = whole.values, blocks.to_dense()
    assert_close(metrics.frobenius_error(exact, blocks), (f - g).norm() / f.norm(), 1e-10)
    assert_close(metrics.trace_ratio(exact, blocks), g.trace() / f.trace(), 1e-10)
    p, q = (m + 0.1 * torch.eye(len(f), dtype=f.dtype) for m in (f, g))
    error = (p.inverse() - q.inverse()).norm() / p.inverse().norm()
    assert_close(metrics.inverse_error(exact, blocks, 0.1), error, 1e-9)
    inside = torch.linalg.solve(q, p)
    kl = 0.5 * (inside.trace() - len(p) + q.logdet() - p.logdet())
    assert_close(metrics.gaussian_kl(exact, blocks, 0.1), kl, 1e-9)


def test_sweeps_know_the_eigenvalue_outside_of_the_span():
    made = fl.operators.LowRank.of_rows(normal(2, 2, 3)).inverse(0.5)
    assert made.rest == 2.0
    other = Diagonal(normal(2, 3).square())
    f, g = made.to_dense(), other.to_dense()
    v = normal(2, 3, seed=4)
    for exact, approx, a, b in ((made, other, f, g), (other, made, g, f)):
        swept = metrics.damping_curve(exact, approx, [0.7], gradient=v)
        eye = 0.7 * torch.eye(6, dtype=torch.float64)
        p, q = a + eye, b + eye
        best, step = torch.linalg.solve(p, v.flatten()), torch.linalg.solve(q, v.flatten())
        share = (v.flatten() @ step) ** 2 / ((step @ p @ step) * (v.flatten() @ best))
        assert_close(swept["f_cosine_squared"][0], share, 1e-9)
        error = (p.inverse() - q.inverse()).norm() / p.inverse().norm()
        assert_close(swept["inverse_error"][0], error, 1e-9)
        kl = torch.linalg.solve(q, p).trace() - 6 + q.logdet() - p.logdet()
        assert_close(swept["stein_divergence"][0], kl, 1e-9)


def test_bases_known_to_single_precision_have_a_higher_floor(monkeypatch):
    stats = cases.layer_statistics(cases.outer(1, 4, 3, 2)).to(torch.float32)
    exact, approx = (
        fl.ExactBlock()(stats),
        fl.operators.LowRank.of_rows(stats.samples.matrices()[0] / 2.0),
    )
    monkeypatch.setattr(pairs, "RESIDUAL_ROWS", 5)
    found = metrics.frobenius_error(exact, approx)
    assert isinstance(found, BelowFloor)
    assert found == pairs.SINGLE_FLOOR


def test_gamma_is_positive_for_steps_up_and_down():
    exact, v = Diagonal(torch.tensor([[3.0, 1.0]]).double()), torch.ones(1, 2).double()
    step = torch.tensor([[2.0, 1.0]]).double()
    for direction in (step, -step):  # √(2²·4 + 1²·2) / |2 + 1|
        assert_close(metrics.gamma(exact, direction, v, 1.0), 18**0.5 / 3, 1e-14)
    across = torch.tensor([[1.0, -1.0]]).double()
    assert metrics.gamma(exact, across, v, 1.0) == math.inf
    assert math.isnan(metrics.gamma(exact, 0 * step, v, 1.0))


def test_a_step_that_is_too_long_has_a_negative_decrease():
    exact, approx = (Diagonal(torch.full((1, 2), c).double()) for c in (4.0, 1.0))
    v = torch.ones(1, 2).double()  # (1/2 − 5/8) / (1/10) per entry, at λ = 1
    assert_close(metrics.model_decrease_ratio(exact, approx, v, 1.0), -1.25, 1e-14)
