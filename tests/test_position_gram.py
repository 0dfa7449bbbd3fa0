"""The best Kronecker products of shared weights, found among pairs of positions."""

import numpy as np
import pytest
import torch

import fisherlab as fl
from fisherlab.approximators.kpsvd_choice import choose
from fisherlab.approximators.rearranged import PositionGram, Rearranged
from fisherlab.numerics.packed import PositionTable
from fisherlab.samples import TurnedSamples
from tests import cases
from tests.oracles import rearranged, second_moment_block

SAMPLES = {
    "one column": cases.shared(1, 3, 2, 7, 9),
    "columns": cases.shared(2, 3, 3, 6, 5),
    "narrow": cases.shared(2, 5, 4, 3, 2),
}


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_pairs_are_those_of_the_whole_rearrangement(samples, rank):
    dense = second_moment_block(samples.matrices(), samples.examples)
    values = np.linalg.svd(rearranged(dense, samples.weight_shape), compute_uv=False)
    op = fl.KPSVD(rank, PositionGram())(cases.layer_statistics(samples))
    assert op.converged
    assert len(op.terms) == rank
    np.testing.assert_allclose(op.singular_values, values[:rank], rtol=1e-9)
    tail = float((values[rank:] ** 2).sum()) ** 0.5
    assert float((op.to_dense() - dense).norm()) == pytest.approx(tail, rel=1e-7)
    smallest = [float(torch.linalg.eigvalsh(f)[0] / f.norm()) for f in op.terms[0]]
    assert min(smallest) > -1e-10


@pytest.mark.parametrize(("v", "n", "t", "d"), [(1, 3, 4, 5), (2, 3, 2, 4)])
def test_a_table_holds_the_inner_products_of_pairs_of_positions(v, n, t, d):
    rows = torch.randn(v, n, t, d, dtype=torch.float64)
    outer = torch.einsum("vntd,vnse->vntsde", rows, rows).flatten(1, 3).flatten(2)
    whole = torch.einsum("vaf,wbf->ab", outer, outer)
    table = PositionTable.of(rows)
    torch.testing.assert_close(table @ torch.eye(len(whole)).double(), whole)
    torch.testing.assert_close(table.diagonal(), sum_of_squares(outer))


def sum_of_squares(outer):
    return outer.sum(0).square().sum(1)


def test_a_weight_stored_the_other_way_round_has_the_pairs_turned():
    upright = Rearranged(cases.shared(2, 3, 2, 6, 5), 3)
    turned = Rearranged(TurnedSamples(upright.samples), 3)
    ((rows, cols),) = PositionGram()(upright, 1).pairs
    ((first, second),) = PositionGram()(turned, 1).pairs
    torch.testing.assert_close((first, second), (cols, rows))


def test_it_is_chosen_for_few_examples_of_a_wide_weight_alone():
    """And what is subtracted, or a narrow weight, goes another way."""
    wide = Rearranged(cases.shared(1, 4, 8, 96, 96), 4)
    assert isinstance(choose(wide, 1), PositionGram)
    terms = ((torch.eye(96).double(), torch.eye(96).double()),)
    assert not isinstance(choose(wide.less(terms), 1), PositionGram)
    narrow = Rearranged(cases.shared(1, 40, 16, 3, 3), 40)
    assert not isinstance(choose(narrow, 1), PositionGram)
    with pytest.raises(ValueError, match="PositionGram solves whole blocks"):
        PositionGram()(wide.less(terms), 1)


def test_float32_statistics_give_the_pairs_of_float64():
    samples = cases.shared(1, 4, 3, 20, 24)
    fine, single = (
        fl.KPSVD(1, PositionGram())(cases.layer_statistics(samples.to(dtype)))
        for dtype in (torch.float64, torch.float32)
    )
    assert single.dtype == torch.float32
    assert float((single.to(torch.float64).to_dense() - fine.to_dense()).norm()) < 1e-5 * (
        fine.frobenius_norm()
    )
