"""Laws of noise, of decompositions, of sweeps, ranks and fronts."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats as scipy_stats
from torch import nn

import fisherlab as fl
from fisherlab.analysis import front
from fisherlab.metrics import BelowFloor
from fisherlab.metrics.sweeps import OF_DIRECTIONS, OF_MATRICES
from tests import cases
from tests.cases import normal
from tests.model_zoo import randomised
from tests.oracles import assert_close

NAMES = ["exact", "kfac", "ekfac", "kpsvd", "mini-block", "diagonal"]


@pytest.fixture(scope="module")
def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = normal(12, 3)
    return model, (x, torch.arange(12) % 3)


@pytest.fixture(scope="module")
def conv():
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Categorical())
    return fl.collect(model, (x, y), fl.Categorical(), compress=False)


@pytest.fixture(scope="module")
def noisy(problem):
    model, data = problem
    return fl.uncertainty(
        model, data, fl.Categorical(), NAMES, seeds=[1, 2, 5], damping=0.1, level=0.9
    )


def test_every_seed_is_a_comparison_of_its_own_sample(problem, noisy):
    model, data = problem
    for seed in (1, 5):
        stats = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(1, seed=seed))
        alone = fl.compare(stats, NAMES, damping=0.1)
        for name in ("frobenius_error", "inverse_error", "trace_ratio"):
            xr.testing.assert_allclose(noisy[name].sel(seed=seed, drop=True), alone[name])
    assert noisy.attrs["confidence"] == 0.9
    assert "seed" not in noisy.attrs


def test_intervals_are_students(noisy):
    cell = noisy.sel(layer="0", approximator="kfac")
    values = cell["frobenius_error"].values
    spread = values.std(ddof=1) / 3**0.5
    low, high = scipy_stats.t.interval(0.9, 2, values.mean(), spread)
    assert_close(float(cell["frobenius_error_mean"]), values.mean(), 1e-12)
    assert_close(float(cell["frobenius_error_low"]), low, 1e-12)
    assert_close(float(cell["frobenius_error_high"]), high, 1e-12)
    assert noisy["inverse_error_low"].dims == ("layer", "approximator", "damping")


def test_a_fixed_reference_measures_sampling_too(problem):
    model, data = problem
    found = fl.uncertainty(
        model, data, fl.Categorical(), ["exact"], seeds=[1, 2], reference=fl.Exact()
    )
    exact = fl.collect(model, data, fl.Categorical())
    sampled = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(1, seed=2))
    pair = fl.ExactBlock()(exact["0"]), fl.ExactBlock()(sampled["0"])
    expected = fl.metrics.frobenius_error(*pair, mixed=True)
    assert_close(
        float(found["frobenius_error"].sel(seed=2, layer="0").item()), expected, 1e-10
    )
    assert found.attrs["reference_fisher"] == "Exact()"


def test_the_noise_floor_is_that_of_the_reference(problem, noisy):
    from fisherlab.metrics.pairs import noise_floors

    model, data = problem
    stats = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(1, seed=1))
    floors = noise_floors(fl.ExactBlock()(stats["0"]), 8)
    cell = noisy.sel(layer="0")
    assert_close(float(cell["noise_floor"]), np.sqrt(np.mean(np.square(floors))), 1e-12)
    assert float(cell["noise_floor_low"]) == min(floors)
    within = noisy["frobenius_error_mean"] <= noisy["noise_floor"]
    assert (noisy["below_noise"] == within).all()
    assert set(np.unique(noisy["below_noise"])) <= {0, 1}


def test_ties_are_paired_differences_that_may_be_zero(noisy):
    tied, means = noisy["tied_with_best"], noisy["frobenius_error_mean"]
    for layer in noisy["layer"].values:
        rivals = means.sel(layer=layer).drop_sel(approximator="exact")
        best = str(rivals.approximator.values[int(rivals.values.argmin())])
        assert int(tied.sel(layer=layer, approximator=best)) == 1
        errors = noisy["frobenius_error"].sel(layer=layer)
        for name in NAMES[1:]:
            if name == best:
                continue
            gaps = errors.sel(approximator=name) - errors.sel(approximator=best)
            low, _ = scipy_stats.t.interval(0.9, 2, gaps.mean(), gaps.std(ddof=1) / 3**0.5)
            expected = low <= 0 or float(gaps.mean()) <= 1e-6
            assert bool(tied.sel(layer=layer, approximator=name)) == expected


def test_one_seed_and_exact_fishers_have_no_interval(problem):
    model, data = problem
    found = fl.uncertainty(
        model, data, fl.Categorical(), ["kfac", "diagonal"], fisher=fl.Exact()
    )
    assert found.sizes["seed"] == 1
    assert np.isnan(found["frobenius_error_low"]).all()
    assert np.isfinite(found["noise_floor"]).all()
    for row in found["tied_with_best"].values:
        assert sorted(row) == [-1, 1]  # the best is known, the other is not
    for wrong in ({"seeds": []}, {"level": 1.0}):
        with pytest.raises(ValueError, match=r"seeds and 0 < level < 1"):
            fl.uncertainty(model, data, fl.Categorical(), ["kfac"], **wrong)


def test_decompositions_add_up(problem):
    model, data = problem
    names = [*NAMES, "kpsvd-2"]
    ds = fl.decompose(model, data, fl.Categorical(), names, seed=4)
    whole = ds["error"].sel(source="exact") ** 2
    np.testing.assert_allclose(ds["squared_part"].sum("part"), whole, atol=1e-10)
    total = ds["network_squared_part"].sum("network_part")
    np.testing.assert_allclose(total, ds["network_error"] ** 2)
    exact = fl.collect(model, data, fl.Categorical())
    f = fl.full_matrix(exact)
    for name in names:
        g = torch.zeros_like(f.values)
        for layer, at in f.offsets.items():
            g[at, at] = fl.approximators()[name](exact[layer]).to_dense()
        expected = float((f.values - g).norm() / f.values.norm())
        assert_close(float(ds["network_error"].sel(approximator=name)), expected, 1e-8)
    assert ds.attrs["network_fisher"] == "Exact()"
    assert_close(torch.from_numpy(ds["coupling"].values), fl.metrics.coupling(exact), 1e-12)


def test_the_ladder_is_measured_against_the_exact_block(problem):
    model, data = problem
    ds = fl.decompose(model, data, fl.Categorical(), ["exact", "kfac"], seed=4, samples=2)
    fishers = {
        "exact": fl.Exact(),
        "sampled": fl.MonteCarlo(2, seed=4),
        "empirical": fl.Empirical(),
    }
    exact = fl.collect(model, data, fl.Categorical())
    for source, fisher in fishers.items():
        stats = fl.collect(model, data, fl.Categorical(), fisher)
        for layer in stats:
            f = fl.ExactBlock()(exact[layer]).to_dense()
            g = fl.KFAC()(stats[layer]).to_dense()
            cell = ds.sel(layer=layer, source=source)
            expected = (f - g).norm() / f.norm()
            assert_close(cell["error"].sel(approximator="kfac").item(), expected, 1e-9)
            other = fl.ExactBlock()(stats[layer]).to_dense()
            expected = (f - other).norm() / f.norm()
            assert_close(cell["source_error"].item(), expected, 1e-8, atol=1e-8)
    assert (ds["source_error"].sel(source="exact") == 0).all()
    unlabelled = fl.decompose(model, (data[0], None), fl.Categorical(), ["kfac"])
    assert np.isnan(unlabelled["source_error"].sel(source="empirical")).all()
    assert np.isnan(unlabelled["error"].sel(source="empirical")).all()


def test_positions_are_expanded_and_reduced():
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], fl.Categorical())
    ds = fl.decompose(model, (x, y), fl.Categorical(), ["kfac"])
    stats = fl.collect(model, (x, y), fl.Categorical())
    for sharing in ("expand", "reduce"):
        exact, kfac = fl.ExactBlock()(stats["0"]), fl.KFAC(sharing)(stats["0"])
        expected = fl.metrics.frobenius_error(exact, kfac)
        assert_close(float(ds["sharing_error"].sel(layer="0", sharing=sharing)), expected)


def test_what_a_layer_lacks_leaves_the_network_unknown():
    model, x, y = cases.data(cases.LAYERS["norm"], fl.Categorical())
    ds = fl.decompose(model, (x, y), fl.Categorical(), ["kfac", "diagonal"])
    assert math.isnan(float(ds["network_error"].sel(approximator="kfac")))
    assert math.isfinite(float(ds["network_error"].sel(approximator="diagonal")))
    assert "gradients" in str(ds["status"].sel(layer="1", approximator="kfac").values)
    assert np.isnan(ds["sharing_error"].sel(layer="1")).all()


def test_a_sweep_is_a_comparison_at_every_damping(conv):
    gradient = {name: normal(*layer.weight_shape) for name, layer in conv.items()}
    levels = fl.RelativeDamping([1e-2, 1.0, 10.0])
    swept = fl.sweep(conv, NAMES, damping=levels, gradient=gradient)
    names = [*OF_MATRICES, *OF_DIRECTIONS]
    compared = fl.compare(
        conv,
        NAMES,
        metrics=names,
        damping=levels,
        gradient=gradient,
    )
    for name in names:
        left, right = swept[name].values, compared[name].values
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1.1e-5, err_msg=name)
    assert (swept["status"] == "ok").all()
    assert swept["lambda"].dims == ("layer", "damping")


def test_a_sweep_says_where_a_matrix_is_indefinite():
    def negative(statistics, previous=None):
        return fl.operators.Diagonal(-torch.ones(statistics.weight_shape).double())

    stats = {"0": cases.statistics("linear")}
    stats = fl.statistics.Statistics(stats, stats["0"].provenance)
    found = fl.sweep(stats, {"negative": negative, "kfac": fl.KFAC()}, damping=[0.5, 2.0])
    errors = found["inverse_error"].sel(layer="0")
    assert np.isnan(errors.sel(approximator="negative")).values.tolist() == [True, False]
    assert "at most 1" in str(found["status"].sel(approximator="negative").values)
    assert np.isfinite(errors.sel(approximator="kfac")).all()
    with pytest.raises(ValueError, match=r"direction_cosine.*without a gradient"):
        fl.sweep(stats, ["kfac"], metrics=["direction_cosine"])


def test_bounds_are_named_beside_the_numbers():
    stats = {"0": cases.statistics("linear")}
    stats = fl.statistics.Statistics(stats, stats["0"].provenance)

    def close(statistics, previous=None):
        exact = fl.ExactBlock()(statistics).to_dense()
        return fl.operators.Dense(exact * (1 + 1e-13), statistics.weight_shape)

    found = fl.sweep(stats, {"close": close}, damping=[0.5], metrics=["inverse_error"])
    assert found["floored"].item() == "inverse_error[damping=0.5]"
    assert 0 < float(found["inverse_error"].item()) <= 1e-5
    assert issubclass(BelowFloor, float)


def test_rank_curves_are_reached_by_the_approximations(conv):
    curve = fl.rank_curve(conv, ranks=[2, 1, 3])
    assert curve["rank"].values.tolist() == [1, 2, 3]
    for name, layer in conv.items():
        exact = fl.ExactBlock()(layer)
        for rank in (1, 2):
            reached = fl.metrics.frobenius_error(exact, fl.KPSVD(rank=rank)(layer))
            error = curve["error"].sel(layer=name, family="kronecker", rank=rank)
            assert_close(float(error), reached, 1e-7, atol=1e-7)
        f = exact.to_dense()
        values, vectors = torch.linalg.eigh(f)
        best = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
        error = curve["error"].sel(layer=name, family="eigen", rank=2)
        assert_close(float(error), (f - best).norm() / f.norm(), 1e-7)
        share = curve["singular_value"].sel(layer=name, family="eigen", rank=2)
        assert_close(float(share), values[-2] / values[-1], 1e-8)
    with pytest.raises(ValueError, match="from 1"):
        fl.rank_curve(conv, ranks=[0])


def test_structure_holds_the_masses_of_every_layer(conv):
    found = fl.structure(conv, damping=0.1, matrix=fl.full_matrix(conv))
    f = fl.ExactBlock()(conv["3"])
    dense, inverse = f.to_dense(), f.inverse(0.1).to_dense()
    rows = fl.Partition.by_row(conv["3"].weight_shape)
    cell = found.sel(layer="3")
    assert_close(float(cell["mini_block_squared_mass"]), _mass(dense, rows, 2), 1e-10)
    assert_close(float(cell["mini_block_absolute_mass"]), _mass(dense, rows, 1), 1e-10)
    expected = _mass(inverse, rows, 2)
    assert_close(float(cell["inverse_mini_block_squared_mass"]), expected, 1e-9)
    assert_close(float(cell["mini_block_entries"]), 1 / 3, 1e-12)
    whole = fl.full_matrix(conv)
    shares = found["squared_mass"].values
    assert_close(shares.sum(), 1.0, 1e-12)
    assert_close(float(found["diagonal_squared_mass"]), np.trace(shares), 1e-10)
    assert float(found["tridiagonal_squared_mass"]) == 1.0
    assert_close(
        found["mean_absolute"].values[0, 1], whole.block("0", "3").abs().mean(), 1e-12
    )
    with pytest.raises(ValueError, match="one damping"):
        fl.structure(conv, damping=[0.1, 0.2])


def test_compressed_columns_leave_the_couplings_out_and_say_why():
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 5)).double()
    stats = fl.collect(model, (normal(6, 3), None), fl.Categorical())
    found = fl.structure(stats)
    assert np.isnan(found["coupling"]).all()
    assert np.isnan(found["diagonal_squared_mass"])
    assert "compress=False" in found.attrs["coupling_status"]
    assert np.isfinite(found["kronecker_tail"]).all()


def _mass(dense, partition, power):
    inside = sum(
        float(dense[g[:, :, None], g[:, None, :]].abs().pow(power).sum())
        for g in partition.groups
    )
    return inside / float(dense.abs().pow(power).sum())


def test_spectra_are_eigenvalues_of_every_layer(conv):
    tree = fl.spectra(conv, ["kfac", "diagonal"])
    for name, layer in conv.items():
        node = tree[name]
        dense = fl.ExactBlock()(layer).to_dense()
        expected = torch.linalg.eigvalsh(dense).flip(0)
        found = torch.from_numpy(node["eigenvalue"].sel(approximator="exact").values)
        assert_close(found, expected, 1e-10)
        values = torch.from_numpy(node["kronecker_value"].values)
        assert_close(values.norm(), dense.norm(), 1e-10)
        assert node.attrs["mean_eigenvalue"] == pytest.approx(float(expected.mean()))


def test_costs_are_counted_and_fronts_marked(conv):
    ds = fl.pareto(conv, ["kfac", "kpsvd", "diagonal", "exact"], repeats=1)
    for name, layer in conv.items():
        kfac = fl.KFAC()(layer)
        cell = ds.sel(layer=name, approximator="kfac")
        assert float(cell["cost_value"].sel(cost="stored_bytes")) == 8 * kfac.stored_numbers
        flops = kfac.inverse(0.1).product_flops
        assert float(cell["cost_value"].sel(cost="solve_flops")) == flops
        assert float(cell["cost_value"].sel(cost="build_seconds")) > 0
    bytes_front = ds["on_front"].sel(cost="stored_bytes")
    assert (bytes_front.sel(approximator="exact") == 1).all()
    assert ds["error"].attrs["long_name"] == "relative Frobenius error"
    damped = fl.pareto(conv, ["kfac"], error="inverse_error", repeats=1)
    assert damped.attrs["metric"] == "inverse_error"
    for wrong in ({"error": "cosine_similarity"}, {"error": "beauty"}):
        with pytest.raises(ValueError, match=r"frobenius_error.*is expected"):
            fl.pareto(conv, ["kfac"], **wrong)
    with pytest.raises(ValueError, match="one damping and repeats"):
        fl.pareto(conv, ["kfac"], repeats=0)


def test_a_front_is_what_nothing_else_beats():
    generator = np.random.default_rng(0)
    points = generator.random((2, 3, 9)).round(1)  # rounded: there are ties
    points[0, 1, 4] = np.nan
    dims = ("layer", "approximator")
    error, cost = (xr.DataArray(one, dims=dims) for one in points)
    marks = front(error, cost).values
    for layer in range(3):
        for one in range(9):
            e, c = points[:, layer, one]
            if np.isnan(e):
                assert marks[layer, one] == -1
                continue
            beaten = any(
                f <= e and d <= c and (f < e or d < c)
                for f, d in points[:, layer].T
                if not np.isnan(f)
            )
            assert marks[layer, one] == (not beaten)
    with pytest.raises(ValueError, match="need the dim"):
        front(error, xr.DataArray(1.0))


def test_networks_are_compared_as_one_matrix(problem):
    model, (x, _) = problem
    stats = fl.collect(model, (x, None), fl.Gaussian(), compress=False)
    gradient = {name: normal(*layer.weight_shape) for name, layer in stats.items()}
    ds = fl.compare_networks(stats, damping=0.1, gradient=gradient)
    f = fl.full_matrix(stats).values
    v = torch.cat([gradient[name].flatten() for name in stats])
    p = f + 0.1 * torch.eye(len(f), dtype=f.dtype)
    assert ds["layer"].values.tolist() == ["network"]
    for name, method in fl.network_approximators().items():
        operator = method(stats)
        g, cell = operator.to_dense(), ds.sel(approximator=name).squeeze()
        expected = (f - g).norm() / f.norm()
        assert_close(cell["frobenius_error"].item(), expected, 1e-8, atol=1e-6)
        step = operator.solve(v[:, None], 0.1)[:, 0]
        best = torch.linalg.solve(p, v)
        cosine = (step @ best) / (step.norm() * best.norm())
        assert_close(cell["direction_cosine"].item(), cosine, 1e-7)
    assert float(ds["frobenius_error"].sel(approximator="exact-network").item()) <= 1e-6
    krylov = ds.sel(approximator="two-level-kfac-krylov")
    assert np.isnan(krylov["inverse_error"]).all()
    assert "no matrix" in str(krylov["status"].item())
    with pytest.raises(ValueError, match=r"'nothing' unknown"):
        fl.compare_networks(stats, ["nothing"])


def test_an_indefinite_method_keeps_the_error_and_the_costs_that_need_no_damping():
    model = randomised(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    data = normal(12, 6), None
    stats = fl.collect(model, data, fl.Categorical(), layers=["0"])
    smallest = torch.linalg.eigvalsh(fl.KPSVD(rank=2)(stats["0"]).to_dense())[0]
    assert smallest < -1e-3  # far below what the damping lifts
    ds = fl.pareto(stats, ["kpsvd-2"], damping=1e-9, repeats=1)
    cell = ds.isel(layer=0, approximator=0)
    assert "not positive definite" in str(cell["status"].values)
    assert np.isfinite(float(cell["error"]))
    costs = cell["cost_value"]
    assert np.isfinite(costs.sel(cost=["stored_bytes", "build_seconds"])).all()
    assert np.isnan(costs.sel(cost=["solve_flops", "solve_seconds"])).all()


def test_decompose_takes_a_list_of_batches_and_refuses_what_is_read_once():
    model = torch.nn.Linear(3, 2).double()
    batches = [(torch.rand(5, 3).double(), None)]
    found = fl.decompose(model, batches, fl.Categorical(), ["kfac"])
    assert np.isnan(found.error.sel(source="empirical")).all()
    with pytest.raises(TypeError, match="three times"):
        fl.decompose(model, iter(batches), fl.Categorical(), ["kfac"])
