"""Laws of spectral densities: moments, whole spectra, and what is drawn of them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab import plots
from fisherlab.numerics.krylov import gauss_nodes
from tests import cases
from tests.oracles import assert_close, second_moment_block

METHODS = ["kfac", "ekfac", "kpsvd-2", "mini-block", "diagonal"]


@pytest.fixture(scope="module")
def stats():
    model = cases._dense(4, 3, 3)
    with torch.no_grad():
        for k, p in enumerate(model.double().parameters()):
            p.copy_(cases.normal(*p.shape, seed=k))
    return fl.collect(model, (cases.normal(6, 4), None), fl.Categorical())


def dense(stats, name, method="exact"):
    if method == "exact":
        layer = stats[name]
        return second_moment_block(layer.example_gradients(), layer.count)
    return fl.approximators()[method](stats[name]).to_dense()


def points(node, method):
    row = node.sel(approximator=method)
    kept = np.isfinite(row["share"].values)
    return (torch.from_numpy(row[n].values[kept]) for n in ("eigenvalue", "share"))


def repeated(values, shares, size):
    """Write every eigenvalue as often as its share says."""
    counts = (shares * size).round().long()
    return values.repeat_interleave(counts).sort().values


@pytest.mark.parametrize("method", ["exact", *METHODS])
def test_whole_spectra_are_those_of_the_dense_matrices(stats, method):
    tree = fl.density(stats, METHODS)
    for name in stats:
        matrix, node = dense(stats, name, method), tree[name].to_dataset()
        values, shares = points(node, method)
        found = repeated(values, shares, len(matrix))
        assert_close(found, torch.linalg.eigvalsh(matrix), 1e-9, atol=1e-12)
        assert float(shares.sum()) == pytest.approx(1.0)
        assert str(node["way"].sel(approximator=method).item()) == "whole"
        assert float(node.attrs["mean_eigenvalue"]) == pytest.approx(
            float(dense(stats, name).trace()) / len(matrix)
        )


def test_zeros_beside_the_gram_matrix_are_one_point():
    stats = fl.collect(
        nn.Linear(30, 3).double(), (cases.normal(4, 30), None), fl.Gaussian()
    )
    node = fl.density(stats, ["diagonal"])["weight"].to_dataset()
    values, shares = points(node, "exact")
    assert (len(values), float(values[-1])) == (13, 0.0)
    assert float(shares[-1]) == pytest.approx((93 - 12) / 93)
    expected = torch.linalg.eigvalsh(dense(stats, "weight"))
    assert_close(repeated(values, shares, 93), expected, 1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["exact", *METHODS])
def test_moments_of_the_quadrature_are_exact_for_its_probes(stats, method):
    steps, probes = 4, 3
    tree = fl.density(stats, METHODS, probes=probes, steps=steps, seed=5, whole=0)
    for name in stats:
        matrix = dense(stats, name, method)
        values, shares = points(tree[name].to_dataset(), method)
        assert str(tree[name]["way"].sel(approximator=method).item()) == "quadrature"
        draw = torch.Generator().manual_seed(5)
        signs = [torch.randint(0, 2, (len(matrix),), generator=draw) for _ in range(probes)]
        for power in range(2 * steps):
            forms = torch.linalg.matrix_power(matrix, power)
            expected = [(2.0 * s - 1).double() for s in signs]
            mean = sum(z @ forms @ z for z in expected) / (probes * len(matrix))
            assert_close((shares * values**power).sum(), mean, 1e-8)


def test_with_as_many_steps_as_distinct_eigenvalues_nothing_is_left_out(stats):
    tree = fl.density(stats, ["kfac"], probes=2, steps=500, whole=0)
    for name in stats:
        for method in ("exact", "kfac"):
            matrix = dense(stats, name, method)
            values, vectors = torch.linalg.eigh(matrix)
            found, shares = points(tree[name].to_dataset(), method)
            near = (found[:, None] - values).abs().min(1).values
            assert float(near.max()) < 1e-9 * float(values[-1])
            draw = torch.Generator().manual_seed(0)
            want = 0.0
            for _ in range(2):
                z = 2.0 * torch.randint(0, 2, (len(matrix),), generator=draw) - 1
                want += float((vectors.T @ z.double())[-1] ** 2) / (2 * len(matrix))
            top = found > values[-1] * (1 - 1e-6)
            if float(values[-2]) < 0.999 * float(values[-1]):
                assert float(shares[top].sum()) == pytest.approx(want, abs=1e-8)


def test_many_probes_come_near_the_moments_of_the_matrix(stats):
    probes = 400
    tree = fl.density(stats, "kfac", probes=probes, steps=6, whole=0)
    for name in stats:
        matrix = dense(stats, name)
        values, shares = points(tree[name].to_dataset(), "exact")
        for power in (1, 2):
            m = torch.linalg.matrix_power(matrix, power)
            spread = (2 * (m.square().sum() - m.diagonal().square().sum()) / probes) ** 0.5
            gap = abs(float((shares * values**power).sum() - m.trace() / len(m)))
            assert gap < 4 * float(spread) / len(m)


def test_the_recurrence_ends_where_the_space_is_invariant():
    values = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]).double()
    nodes, weights = gauss_nodes(lambda x: values * x, torch.ones(5).double(), 5)
    assert_close(nodes, torch.tensor([0.0, 1.0, 2.0]).double(), 1e-9, atol=1e-12)
    assert_close(weights, torch.tensor([0.4, 0.2, 0.4], dtype=torch.float64), 1e-9)
    nodes, weights = gauss_nodes(lambda x: 0 * x, torch.ones(3).double(), 3)
    assert (nodes.tolist(), weights.tolist()) == ([0.0], [1.0])
    with pytest.raises(fl.NumericalError, match="Lanczos"):
        gauss_nodes(lambda x: x / 0, torch.ones(3).double(), 3)


def test_the_seed_alone_decides_and_bad_requests_are_refused(stats):
    one, same, other = (
        fl.density(stats, ["kfac"], steps=3, whole=0, seed=s)["0"]["share"].values
        for s in (1, 1, 2)
    )
    assert np.array_equal(one, same, equal_nan=True)
    assert not np.array_equal(one, other, equal_nan=True)
    with pytest.raises(ValueError, match="steps=0"):
        fl.density(stats, steps=0)
    small = fl.density(stats, ["kfac"], whole=0, budget=300)["0"].to_dataset()
    assert "Lanczos basis" in str(small["status"].sel(approximator="exact").item())
    assert np.isnan(small["share"].values).all()


def test_norm_layers_have_a_density_and_kfac_of_them_a_reason():
    model, x, _ = cases.data(cases.LAYERS["norm"], fl.Categorical())
    stats = fl.collect(model, (x, None), fl.Categorical())
    node = fl.density(stats, ["kfac"])["1"].to_dataset()
    assert list(node["way"].values) == ["whole", ""]
    assert "inputs and output gradients" in str(node["status"].values[1])
    grid = plots.density(fl.density(stats, ["kfac"]))
    assert grid.figure.legends
    plt.close("all")


def test_a_drawn_density_integrates_to_the_shares(stats):
    tree = fl.density(stats, ["kfac", "diagonal"])
    grid = plots.density(tree, layers=["0"])
    ax = grid.axes_dict["0"]
    values, shares = points(tree["0"].to_dataset(), "kfac")
    line = next(line for line in ax.lines if line.get_label() == "kfac")
    x, y = np.log10(line.get_xdata()), line.get_ydata()
    kept = values > 1e-12 * values.max()
    assert float(np.trapezoid(y, x)) == pytest.approx(float(shares[kept].sum()), rel=1e-3)
    assert "exact" in ax.texts[0].get_text()
    damped = fl.density(stats, ["kfac"], layers=["0"], damping=fl.RelativeDamping(0.5))
    assert list(damped.children) == ["0"]
    exact = torch.linalg.eigvalsh(fl.ExactBlock()(stats["0"]).to_dense())
    assert damped["0"].attrs["lambda"] == pytest.approx(0.5 * float(exact.mean()))
    ax = plots.density(damped).axes_dict["0"]
    share = 100 * float((exact > 0.5 * exact.mean()).double().mean())
    assert f"> λ: exact {share:.2g} %" in ax.texts[0].get_text()
    line = next(line for line in ax.lines if line.get_label() == "λ")
    assert line.get_xdata()[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one damping is expected"):
        fl.density(stats, ["kfac"], damping=[0.1, 1.0])
    with pytest.raises(ValueError, match="no layer"):
        plots.density(tree, layers=["9"])
    with pytest.raises(ValueError, match=r"fl\.density"):
        plots.density(fl.inverse_blocks(stats, ["kfac"], 0.1))
    plt.close("all")
