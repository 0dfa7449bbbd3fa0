"""Laws of the probes, each against an independent computation."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import xarray as xr

import fisherlab as fl
from fisherlab.approximators.network import PerBlock
from fisherlab.problems import Problem
from fisherlab.problems.problem import drawn
from fisherlab.training import serialise
from fisherlab.training.probes import Moment
from fisherlab.training.serialise import pack, unpack
from tests.cases import normal
from tests.model_zoo import randomised
from tests.test_analysis import Beside
from tests.training_runs import adam, small


def moment(problem, step=0):
    return Moment(problem, adam(problem), step, (problem.train), seed=0)


def per_example_gradients(problem, x, y):
    """Return G (N, p) of the last layer with its bias, by one backward pass each."""
    weight, bias = problem.model.fc2.weight, problem.model.fc2.bias
    rows = []
    for one, label in zip(x, y, strict=True):
        loss = torch.nn.functional.cross_entropy(problem.model(one[None]), label[None])
        dw, db = torch.autograd.grad(loss, [weight, bias])
        rows.append(torch.cat([dw, db[:, None]], 1).flatten())
    return torch.stack(rows)


def test_errors_are_those_of_compare_at_that_iterate():
    problem = small()
    probe = fl.probes.Errors(["kfac", "diagonal"], damping=0.1, examples=15)
    ds = fl.follow(problem, adam, steps=3, every=[3], probes=[probe])
    data = drawn(problem.train, 15, seed=0)
    stats = fl.collect(problem.model, data, problem.likelihood)
    gradient = fl.mean_gradient(problem.model, data, problem.likelihood)
    expected = fl.compare(stats, ["kfac", "diagonal"], damping=0.1, gradient=gradient)
    for name in ("frobenius_error", "inverse_error", "direction_cosine"):
        np.testing.assert_array_equal(ds[name].sel(step=3), expected[name])


def test_sampled_labels_are_drawn_anew_at_every_moment():
    probe = fl.probes.Errors(["kfac"], fl.MonteCarlo(1), metrics=["frobenius_error"])
    still = torch.optim.SGD
    ds = fl.follow(
        small(),
        lambda p: still(p.model.parameters(), lr=0.0),
        steps=2,
        every=1,
        probes=[probe],
    )
    assert len(np.unique(ds.frobenius_error.sel(layer="fc1"))) == 3


def test_losses_are_means_over_examples_in_nats():
    problem = small()
    (x, y), (u, v) = problem.train, problem.test
    ds = fl.probes.Losses()(moment(problem))
    with torch.no_grad():
        train = torch.nn.functional.cross_entropy(problem.model(x), y).item()
        test = (problem.model(u).argmax(1) == v).double().mean().item()
    assert float(ds.train_loss) == pytest.approx(train, rel=1e-12)
    assert float(ds.test_accuracy) == test


def test_spectra_are_those_of_the_dense_blocks():
    problem = small()
    ds = fl.probes.Spectra(["kfac"], count=20)(moment(problem))
    stats = fl.collect(problem.model, problem.train, problem.likelihood)
    for name, method in (("exact", fl.ExactBlock()), ("kfac", fl.KFAC())):
        dense = method(stats["fc2"]).to_dense().numpy()
        expected = np.linalg.eigvalsh(dense)[::-1]
        found = ds.eigenvalue.sel(layer="fc2", approximator=name).values
        np.testing.assert_allclose(found[:18], expected, atol=1e-12)
        assert np.isnan(found[18:]).all()


def test_inverse_blocks_are_inverses():
    problem = small()
    ds = fl.probes.InverseBlocks(["kfac"], 0.1)(moment(problem))
    stats = fl.collect(problem.model, problem.train, problem.likelihood)
    dense = fl.ExactBlock()(stats["fc2"]).to_dense() + 0.1 * torch.eye(18).double()
    exact = ds.inverse_fc2.sel(approximator="exact").values
    np.testing.assert_allclose(exact @ dense.numpy(), np.eye(18), atol=1e-10)
    assert ds.inverse_fc1.shape == (2, 25, 25)


def by_rows(matrix):
    """Keep the blocks of one output each of an 18 x 18 matrix."""
    kept = torch.zeros(3, 6, 3, 6, dtype=matrix.dtype)
    for o in range(3):
        kept[o, :, o] = matrix.view(3, 6, 3, 6)[o, :, o]
    return kept.view(18, 18)


def test_directions_are_algorithm_5_by_hand():
    """Dense averages of the empirical Fisher, debiased, and heavy-ball momentum."""
    lam, rho, mu = 0.05, 0.8, 0.7
    eye = torch.eye(18, dtype=torch.float64)
    fisher, outer, weight, m = 0 * eye, 0 * eye, 0.0, 0.0
    expected = []

    def by_hand(moment):
        nonlocal fisher, outer, weight, m
        rows = per_example_gradients(moment.problem, *moment.batch)
        mean = rows.mean(0)
        fisher = rho * fisher + (1 - rho) * rows.T @ rows / len(rows)
        outer = rho * outer + (1 - rho) * torch.outer(mean, mean)
        weight, m = rho * weight + (1 - rho), mu * m + mean
        used = [fisher, by_rows(fisher), by_rows(outer)]
        best, mini, mbf = (torch.linalg.solve(f / weight + lam * eye, m) for f in used)
        cosines = [torch.cosine_similarity(v, best, dim=0) for v in (m, mini, mbf)]
        expected.append([float(c) for c in cosines])
        return xr.Dataset()

    methods = {
        "mini-block": fl.MiniBlock(),
        "mbf": fl.MiniBlock(statistic="mean_gradient"),
    }
    probe = fl.probes.Directions(
        methods, damping=lam, average=rho, momentum=mu, layers=["fc2"]
    )
    ds = fl.follow(small(), adam, steps=4, every=1, batch_size=8, probes=[by_hand, probe])
    found = ds.averaged_direction_cosine.sel(layer="fc2")
    assert found.approximator.values.tolist() == ["gradient", "mini-block", "mbf"]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_exact_blocks_agree_with_themselves_and_an_indefinite_sum_is_told():
    problem = small()
    methods = {"again": fl.ExactBlock(), "bad": Negative()}
    probe = fl.probes.Directions(methods, damping={"exact": 0.1, "bad": 0.2})
    memory = probe.observe(None, moment(problem))
    ds = probe.measure(memory, moment(problem))
    cosines = ds.averaged_direction_cosine
    np.testing.assert_allclose(cosines.sel(approximator="again"), 1, rtol=1e-12)
    assert np.isnan(cosines.sel(approximator="bad")).all()
    assert "not positive definite" in str(
        ds.direction_status.sel(approximator="bad")[0].item()
    )


def test_methods_that_couple_layers_are_followed_too(tmp_path):
    networks = {
        "per block": PerBlock("kfac"),
        "tridiagonal": fl.KFACTridiagonal(),
    }
    probe = fl.probes.Directions(["kfac"], 0.1, average=0.5, network=networks)
    options = {"every": 1, "batch_size": 8, "probes": [probe]}
    ds = fl.follow(small(), adam, steps=3, store=tmp_path / "run", **options)
    cosines = ds.averaged_direction_cosine
    names = ["gradient", "kfac", "per block", "tridiagonal"]
    assert cosines.approximator.values.tolist() == names
    np.testing.assert_allclose(
        cosines.sel(approximator="per block"), cosines.sel(approximator="kfac"), rtol=1e-9
    )
    assert float(abs(cosines - cosines.sel(approximator="kfac"))[:, :, -1].max()) > 1e-4
    longer = fl.follow(small(), adam, steps=5, store=tmp_path / "run", **options)
    whole = fl.follow(small(), adam, steps=5, **options)
    xr.testing.assert_equal(
        longer.averaged_direction_cosine.load(), whole.averaged_direction_cosine
    )


class Negative:
    """Minus the identity."""

    def __call__(self, statistics, previous=None):
        o, i = statistics.weight_shape
        return fl.Dense(-torch.eye(o * i, dtype=torch.float64), (o, i))


def test_fresh_factors_are_not_stale_and_old_ones_are():
    probe = fl.probes.Staleness(["kfac"], refresh_every=3, on="train")
    ds = fl.follow(small(), adam, steps=5, every=1, probes=[probe])
    assert ds.age.values.tolist() == [0, 1, 2, 0, 1, 2]
    new = ds.age == 0
    gap = abs(ds.stale_error - ds.fresh_error).max(["layer", "approximator"])
    np.testing.assert_allclose(gap[new], 0, atol=1e-12)
    assert (gap[~new] > 1e-6).all()


@pytest.mark.parametrize("name", list(fl.approximators()))
def test_every_operator_survives_a_checkpoint(name, tmp_path):
    problem = small()
    stats = fl.collect(problem.model, problem.train, problem.likelihood)
    op = fl.approximators()[name](stats["fc2"])
    torch.save(pack({"op": op}), tmp_path / "a.pt")
    again = unpack(torch.load(tmp_path / "a.pt", weights_only=True))["op"]
    assert torch.equal(again.to_dense(), op.to_dense())
    assert again.provenance == op.provenance


def test_only_plain_values_are_packed_and_their_place_is_named():
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a Generator"):
        pack({"a": [1, torch.Generator()]})
    mixed = {"a": (1, None, 2.5, "x", slice(1, None)), "b": {3: {1, 2}}, "c": np.float64(2)}
    assert unpack(pack(mixed)) == mixed


def test_unpacking_makes_only_dataclasses_and_runs_none_of_their_code():
    with pytest.raises(ValueError, match="os:system, which is not a dataclass"):
        unpack({"__kind__": "os:system", "fields": {}})
    with pytest.raises(ValueError, match="no_such_module"):
        unpack({"__kind__": "no_such_module:Thing", "fields": {}})


def test_operators_are_found_where_they_stand_now():
    held = pack(fl.operators.Diagonal(torch.ones(2, 2)))
    assert (
        unpack(held | {"__kind__": "fisherlab.operators.diagonal:Diagonal"}).trace() == 4.0
    )


@pytest.mark.parametrize(
    ("kind", "now"),
    [
        ("fisherlab.operators.mode_products:Modes", "fisherlab.operators.gradient_roots"),
        ("fisherlab.operators.eigenforms:TensorPiece", "fisherlab.operators.eigenform"),
        ("fisherlab.operators.root_diagonal:RootDiagonal", "fisherlab.operators"),
        ("fisherlab.operators.inverse_factors:InverseFactors", "fisherlab.operators"),
        ("fisherlab.samples.grouped:GroupedSamples", "fisherlab.samples"),
        ("fisherlab.training.clipping:KLClip", "fisherlab.training"),
        ("fisherlab.training.averaging:BiasCorrected", "fisherlab.training"),
        ("fisherlab.operators.network.direct_sum:DirectSum", "fisherlab.operators"),
        (
            "fisherlab.approximators.kpsvd.direct_solvers:DenseSVD",
            "fisherlab.approximators",
        ),
        ("fisherlab.approximators.kpsvd_solvers:Auto", "fisherlab.approximators"),
        ("fisherlab.approximators.states:Sums", "fisherlab.approximators.base"),
    ],
)
def test_a_checkpoint_names_classes_by_the_modules_of_its_time(kind, now):
    name = kind.partition(":")[2]
    expected = getattr(importlib.import_module(now), name)
    assert serialise._class_called(kind) is expected


def test_a_layer_of_which_no_number_is_to_be_had_ends_no_probe():
    model, data = randomised(Beside(1e200)), (normal(8, 3), normal(8, 2))
    torch.nn.init.zeros_(model.extreme.weight)
    at = moment(Problem("beside", model, fl.Gaussian(), train=data, test=data))
    named = {
        "direction_status": fl.probes.Directions(["kfac", "kpsvd"], fl.RelativeDamping(1)),
        "stale_status": fl.probes.Staleness(["kfac", "kpsvd"]),
    }
    for status, probe in named.items():
        found = probe.measure(probe.observe(None, at), at)
        (name, *_) = (n for n, v in found.items() if v.dims == ("layer", "approximator"))
        assert found[name].sel(layer="ordinary").notnull().all()
        assert found[name].sel(layer="extreme").isnull().all()
        assert (found[status] == "ok").sel(layer="ordinary").all()
        assert (found[status] != "ok").sel(layer="extreme").all()
    assert fl.probes.InverseBlocks(["kfac"])(at).inverse_extreme.isnull().all()
