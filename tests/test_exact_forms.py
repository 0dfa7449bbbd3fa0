"""Every way to build or to ask the exact block of a shared weight gives the same block."""

import pytest
import torch

import fisherlab as fl
from fisherlab.operators import FactoredFisher, KroneckerSum, factored
from fisherlab.samples import OuterSamples, SharedSamples, TurnedSamples


def shared(columns, examples, positions, o, i):
    generator = torch.Generator().manual_seed(columns + positions)
    inputs = torch.randn(examples, positions, i, generator=generator, dtype=torch.float64)
    shape = (columns, examples, positions, o)
    return SharedSamples(
        inputs, torch.randn(shape, generator=generator, dtype=torch.float64)
    )


def by_loops(samples):
    """Σ vec(D) vec(D)ᵀ, example by example, column by column, position by position."""
    o, i = samples.weight_shape
    total = torch.zeros(o * i, o * i, dtype=torch.float64)
    for v in range(samples.columns):
        for n in range(samples.examples):
            d = sum(
                torch.outer(samples.gradients[v, n, t], samples.inputs[n, t])
                for t in range(samples.inputs.shape[1])
            )
            total += torch.outer(d.flatten(), d.flatten())
    return total


@pytest.mark.parametrize("form", ["auto", "dense", "gram", "matrices", "pairs"])
@pytest.mark.parametrize("size", [(3, 4, 2, 2, 3), (1, 3, 5, 3, 2), (7, 2, 1, 2, 2)])
def test_every_form_is_the_sum_over_examples(form, size):
    samples = shared(*size)
    block = FactoredFisher(samples, samples.examples, form=form)
    expected = by_loops(samples) / samples.examples
    torch.testing.assert_close(block.to_dense(), expected, rtol=1e-12, atol=1e-12)
    assert block.frobenius_norm() == pytest.approx(float(expected.norm()), rel=1e-12)
    w = torch.ones(block.weight_shape, dtype=torch.float64)
    solved = torch.linalg.solve(
        expected + 0.3 * torch.eye(len(expected)).double(), w.flatten()
    )
    torch.testing.assert_close(block.solve(w, 0.3).flatten(), solved, rtol=1e-9, atol=1e-9)


def test_few_positions_and_many_columns_choose_pairs():
    assert shared(40, 3, 2, 3, 3).pairs_are_cheaper
    assert not shared(2, 3, 9, 3, 3).pairs_are_cheaper


def test_the_choice_is_counted_as_the_cheaper_of_the_two():
    samples = shared(40, 3, 2, 3, 3)
    assert samples.dense_flops() == min(samples._pair_flops(), samples._matrix_flops())


def test_rows_are_those_of_the_dense_block():
    samples = shared(3, 4, 2, 2, 3)
    block = FactoredFisher(samples, 4)
    rows = block.take_rows([5, 0])
    torch.testing.assert_close(rows.flatten(1), block.to_dense()[[5, 0]])
    with pytest.raises(ValueError, match="0 to 5"):
        block.take_rows([6])


def test_an_exact_block_takes_the_form_asked_for():
    model = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 2), torch.nn.Flatten()).double()
    x = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0)).double()
    stats = fl.collect(model, (x, None), fl.Gaussian())["0"]
    blocks = [fl.ExactBlock(form)(stats).to_dense() for form in ("matrices", "pairs")]
    torch.testing.assert_close(*blocks)


def outer(columns, examples, o, i):
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(examples, i, generator=generator, dtype=torch.float64)
    shape = (columns, examples, o)
    return OuterSamples(
        inputs, torch.randn(shape, generator=generator, dtype=torch.float64)
    )


WIDE = {
    "outer": outer(2, 3, 6, 5),
    "shared": shared(2, 3, 2, 6, 5),
    "turned": TurnedSamples(shared(2, 3, 2, 5, 6)),
}


@pytest.mark.parametrize("kind", WIDE)
def test_few_samples_meet_products_of_factors_without_their_matrices(kind, monkeypatch):
    """Divergences of a wide layer took a matrix an example: 28 GB of a CNN's."""
    samples = WIDE[kind]
    block = FactoredFisher(samples, samples.examples, form="gram")
    inverse = block.inverse(0.1)
    dense = torch.linalg.inv(block.to_dense() + 0.1 * torch.eye(30).double())
    generator = torch.Generator().manual_seed(0)
    terms = [
        tuple(torch.randn(d, d, generator=generator, dtype=torch.float64) for d in (6, 5))
        for _ in range(2)
    ]
    symmetric = tuple((g @ g.T, a @ a.T) for g, a in terms)
    formed = []
    monkeypatch.setattr(factored, "PANEL_BYTES", 1)
    for known in (OuterSamples, SharedSamples):
        kept = known.flat
        monkeypatch.setattr(
            known, "flat", lambda s, *a, f=kept: formed.append(s) or f(s, *a)
        )
    for one in (KroneckerSum(symmetric[:1], (6, 5)), KroneckerSum(symmetric, (6, 5))):
        expected = float((dense * one.to_dense()).sum())
        assert inverse.inner(one) == pytest.approx(expected, rel=1e-11)
    own = KroneckerSum(symmetric[:1], (6, 5)).inverse(0.3)
    expected = float((dense * own.to_dense()).sum())
    assert inverse.inner(own) == pytest.approx(expected, rel=1e-11)
    torch.testing.assert_close(inverse.diagonal().flatten(), dense.diagonal())
    assert inverse.trace() == pytest.approx(float(dense.trace()), rel=1e-12)
    if kind != "turned":
        assert all(s.weight_shape[0] == 1 for s in formed)


def test_quadratic_forms_are_half_products():
    block = FactoredFisher(WIDE["shared"], 3)
    w = torch.arange(60).double().view(2, 6, 5)
    torch.testing.assert_close(
        block.quadratic_form(w), (w * (block @ w)).sum((1, 2)), rtol=1e-12, atol=0
    )
