"""Laws of likelihoods and Fishers: each column is what its definition says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fisherlab as fl
from fisherlab.statistics.fishers import require_kinds, uniforms
from tests import cases, oracles
from tests.cases import LIKELIHOODS, labels, normal
from tests.oracles import assert_close

EVERY = pytest.mark.parametrize("name", LIKELIHOODS)
SHAPES = pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2)])


@EVERY
@SHAPES
def test_the_loss_is_torchs_own_summed_over_outputs(name, shape):
    likelihood, z = LIKELIHOODS[name], normal(*shape)
    y = labels(likelihood, shape)
    expected = [
        oracles.loss(likelihood, one, label) for one, label in zip(z, y, strict=True)
    ]
    assert_close(likelihood.loss(z, y), torch.stack(expected), 1e-13)


@EVERY
@SHAPES
def test_the_gradient_is_that_of_the_loss(name, shape):
    likelihood, z = LIKELIHOODS[name], normal(*shape)
    y = labels(likelihood, shape)
    gradient = likelihood.gradient(z, y)
    for one, label, g in zip(z, y, gradient, strict=True):
        assert_close(g.flatten(), oracles.output_gradient(likelihood, one, label), 1e-13)


@EVERY
@SHAPES
def test_the_root_squared_is_the_output_fisher(name, shape):
    likelihood, z = LIKELIHOODS[name], normal(*shape)
    columns = likelihood.column_count(z)
    root = likelihood.root(z, None, slice(0, columns))
    assert root.shape == (columns, *shape)
    for k, one in enumerate(z):
        s = root[:, k].flatten(1)
        assert_close(s.T @ s, oracles.output_fisher(likelihood, one), 1e-12)
    pieces = [likelihood.root(z, None, slice(c, c + 1)) for c in range(columns)]
    assert_close(torch.cat(pieces), root, 1e-15)


@given(st.floats(-600, 600), st.floats(-600, 600))
def test_the_categorical_root_survives_certain_classes(a, b):
    z = torch.tensor([[a, b, 0.0]], dtype=torch.float64)
    root = fl.Categorical().root(z, None, slice(0, 2))[:, 0]
    p = z[0].softmax(0)
    assert_close(root.T @ root, torch.diag(p) - torch.outer(p, p), 0, 1e-15)


@EVERY
def test_sampled_labels_have_the_models_frequencies(name):
    likelihood, z = LIKELIHOODS[name], normal(1, 3).expand(20000, 3)
    each = likelihood.uniforms_per_example(z)
    u = uniforms(seed=0, stream=0, first=0, examples=len(z), each=each)
    y = likelihood.sample(z, u)
    if name == "categorical":
        found = torch.stack([(y == c).double().mean() for c in range(3)])
        assert_close(found, z[0].softmax(0), 0, 0.02)
    elif name == "bernoulli":
        assert_close(y.mean(0), z[0].sigmoid(), 0, 0.02)
    else:
        assert_close(y.mean(0), z[0], 0, 0.03)
        assert_close(y.var(0), [0.7] * 3, 0, 0.03)
    assert float(y.double().mean()) == float(likelihood.sample(z, u).double().mean())


def test_extreme_uniforms_give_labels_that_exist():
    z, ends = normal(2, 3), torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.float64)
    assert fl.Categorical().sample(z, ends).tolist() == [0, 2]
    certain = torch.tensor([[0.0, -800.0, -800.0]] * 2, dtype=torch.float64)
    assert fl.Categorical().sample(certain, ends).tolist() == [0, 0]
    assert torch.isfinite(fl.Gaussian().sample(z, ends.expand(2, 3))).all()


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**70))
def test_random_numbers_belong_to_an_example(first, examples, each, seed):
    def draw(**changed):
        known = {"seed": seed, "stream": 1, "first": 0, "examples": 20, "each": each}
        return uniforms(**known | changed)

    run = draw(first=first, examples=examples)
    assert torch.equal(run, draw()[first : first + examples])
    assert not torch.equal(run, draw(first=first, examples=examples, stream=2))
    assert bool((run >= 0).all() and (run < 1).all())


@EVERY
def test_masked_outputs_vanish_from_every_column(name):
    likelihood, z = LIKELIHOODS[name], normal(3, 2, 2)
    y = labels(likelihood, z.shape)
    y[0] = -100 if name == "categorical" else float("nan")
    y[1, 1] = -100 if name == "categorical" else float("nan")
    for fisher in cases.FISHERS.values():
        count = fisher.column_count(likelihood, z)
        columns = fisher.columns(likelihood, z, y, 0, slice(0, count))
        kept = fisher.columns(
            likelihood, z, labels(likelihood, z.shape), 0, slice(0, count)
        )
        assert bool((columns[:, 0] == 0).all())
        assert bool((columns[:, 1, 1] == 0).all())
        assert_close(columns[:, 1, 0], kept[:, 1, 0], 1e-15)
        assert_close(columns[:, 2], kept[:, 2], 1e-15)
    alone = likelihood.loss(z[1:2, :1], y[1:2, :1])
    assert_close(likelihood.loss(z, y)[:2], [0.0, float(alone)], 1e-13)


def test_monte_carlo_columns_are_weighted_gradients_at_drawn_labels():
    z, likelihood = normal(5, 3), fl.Categorical()
    fisher = fl.MonteCarlo(samples=4, seed=2, step=3)
    columns = fisher.columns(likelihood, z, None, 10, slice(1, 3))
    for k, draw in enumerate((1, 2)):
        y = fisher.labels(likelihood, z, 10, draw)
        assert_close(columns[k], likelihood.gradient(z, y) / 2, 1e-15)
    assert not torch.equal(columns[0], columns[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_class_numbers_of_any_integer_type_are_the_same(dtype):
    z, y = normal(4, 3), torch.tensor([0, 1, 2, 1])
    likelihood = fl.Categorical()
    likelihood.check(z, y.to(dtype))
    assert_close(likelihood.loss(z, y.to(dtype)), likelihood.loss(z, y), 1e-15)
    assert_close(likelihood.gradient(z, y.to(dtype)), likelihood.gradient(z, y), 1e-15)


def test_parameters_that_mean_nothing_are_refused():
    for variance in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="number is expected"):
            fl.Gaussian(variance=variance)
    with pytest.raises(ValueError, match="at least one draw"):
        fl.MonteCarlo(samples=0)


def test_every_step_draws_labels_of_its_own():
    output, fisher = torch.zeros(40, 5).double(), fl.MonteCarlo()
    draws = [fisher.at(k).labels(fl.Categorical(), output, 0, 0) for k in (0, 0, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert not torch.equal(draws[2], draws[3])


ENTRIES = {
    "collect": fl.collect,
    "mean_gradient": fl.mean_gradient,
    "approximate": lambda *given: fl.approximate(*given, ["kfac"]),
    "compare": lambda *given: fl.compare(*given, ["kfac"]),
    "estimate": lambda *given: fl.estimate(*given, ["kfac"]),
    "step": lambda model, batch, likelihood: fl.NaturalGradient(
        model, likelihood, "kfac", lr=0.1, damping=0.1
    ).step(batch=batch),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("likelihood", [fl.Categorical(), fl.Gaussian(), fl.Bernoulli()])
def test_sequences_of_length_zero_are_refused_by_name(entry, likelihood):
    labels = torch.zeros(4, 0, dtype=torch.long)
    if not isinstance(likelihood, fl.Categorical):
        labels = torch.zeros(4, 0, 3)
    with pytest.raises(ValueError, match="holds no number"):
        ENTRIES[entry](torch.nn.Linear(2, 3), (torch.zeros(4, 0, 2), labels), likelihood)


@pytest.mark.parametrize("gone", ["root", "loss", "column_count"])
def test_a_likelihood_of_ones_own_is_told_what_it_lacks(gone):
    kept = {n: f for n, f in vars(fl.Likelihood).items() if n[0] != "_" and n != gone}
    mine = type("Mine", (), kept)()
    with pytest.raises(TypeError, match=f"this one lacks {gone}, see fl.Likelihood"):
        require_kinds(mine, None)
