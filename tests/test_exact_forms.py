"""Every way to build or to ask the exact block of a shared weight gives the same block."""

import pytest
import torch

import fisherlab as fl
from fisherlab.operators import FactoredFisher
from fisherlab.samples import SharedSamples


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
