"""Blocks between layers and the whole matrix are those of the definition."""

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.statistics.network import Chunks
from tests.brute_force import full_fisher, spans
from tests.model_zoo import MODULES, NETWORKS, Case, randomised, rows

NAMES = ["mlp", "lenet", "vit", "gpt", "lstm", "scalar", "twice", "functional"]
WIDE = Case(
    randomised(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4))),
    rows(6, 3),
    None,
    fl.Gaussian(),
)


@pytest.mark.parametrize("name", NAMES)
def test_full_matrix_is_the_brute_force_fisher(name: str) -> None:
    case = (NETWORKS | MODULES)[name]()
    data = (case.x, case.y)
    stats = fl.collect(case.model, data, case.likelihood, compress=False)
    found = fl.full_matrix(stats)
    blocks = fl.blocks(case.model)
    expected, at = full_fisher(case, blocks), spans(blocks, case.model)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-10 * scale)
    assert dict(found.offsets) == at
    first, last = next(iter(blocks)), list(blocks)[-1]
    assert torch.equal(found.block(first, last), found.values[at[first], at[last]])
    assert f"{len(blocks)} blocks" in repr(found)
    assert first in found._repr_html_()


@pytest.mark.parametrize("name", ["mlp", "lenet", "gpt"])
def test_part_of_a_block_at_indices(name: str) -> None:
    case = NETWORKS[name]()
    data = (case.x, case.y)
    stats = fl.collect(case.model, data, case.likelihood, compress=False)
    names = list(stats)
    whole = fl.cross_block(stats, names[0], names[-1])
    part = fl.cross_block(stats, names[0], names[-1], rows=[3, 0], columns=slice(1, 6, 2))
    torch.testing.assert_close(part, whole[[3, 0]][:, 1:6:2], rtol=1e-12, atol=1e-15)
    turned = fl.cross_block(stats, names[-1], names[0])
    torch.testing.assert_close(turned, whole.T, rtol=1e-12, atol=1e-15)


def test_compressed_columns_are_refused_between_layers_only() -> None:
    stats = fl.collect(WIDE.model, (WIDE.x, None), fl.Gaussian())
    assert [stats[name].compressed for name in ("0", "2")] == [True, False]
    with pytest.raises(ValueError, match="compress=False"):
        fl.cross_block(stats, "0", "2")
    own = fl.cross_block(stats, "0", "0")
    torch.testing.assert_close(own, fl.ExactBlock()(stats["0"]).to_dense())
    kept = fl.collect(WIDE.model, (WIDE.x, None), fl.Gaussian(), compress=False)
    found = fl.full_matrix(kept).values
    expected = full_fisher(WIDE, fl.blocks(WIDE.model))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_columns_are_compressed_as_they_come() -> None:
    block = fl.blocks(WIDE.model)["0"]
    inputs = rows(6, 1, 4)
    columns = [rows(3, 6, 1, 2) * (k + 1) for k in range(5)]
    held = Chunks()
    for k, gradients in enumerate(columns):
        count = 6 if k == 0 else 0
        piece = fl.LayerStatistics(block, count, inputs=inputs, gradients=gradients)
        held = held.add(piece)
        assert held.nbytes == inputs.nbytes + 2 * gradients[0].nbytes
    found = held.joined()
    whole = fl.LayerStatistics(block, 6, inputs=inputs, gradients=torch.cat(columns))
    a, b = (fl.ExactBlock()(layer).to_dense() for layer in (found, whole))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_budget_and_unknown_names() -> None:
    stats = fl.collect(WIDE.model, (WIDE.x, None), fl.Gaussian(), compress=False)
    with pytest.raises(fl.BudgetError, match="cross_block of '0' and '2'"):
        fl.cross_block(stats, "0", "2", budget=100)
    with pytest.raises(fl.BudgetError, match="full_matrix"):
        fl.full_matrix(stats, budget=1000)
    with pytest.raises(KeyError, match="no block '1'"):
        fl.cross_block(stats, "0", "1")
