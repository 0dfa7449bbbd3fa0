"""Optimisers in several processes, whose replicas would drift apart without a word."""

import pytest
import torch
from torch import distributed, nn

import fisherlab as fl


@pytest.fixture
def group():
    """Start process groups of any number of ranks within this process."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    def start(ranks):
        distributed.init_process_group(
            "fake", rank=0, world_size=ranks, store=fake.FakeStore()
        )

    yield start
    if distributed.is_initialized():
        distributed.destroy_process_group()


OPTIMISERS = {
    "kfac": lambda m: fl.NaturalGradient(m, fl.Categorical(), "kfac", 0.1, 0.1),
    "of mean gradients": lambda m: fl.NaturalGradient(
        m, fl.Categorical(), "mini-block-mean", 0.1, 0.1
    ),
    "adaptive": lambda m: fl.AdaptiveKFAC(m, fl.Categorical()),
}


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    return model, torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_an_optimiser_refuses_one_process_of_several(make, group):
    model, x, y = problem()
    optimiser = make(model)
    group(2)
    before = model[0].weight.detach().clone()
    with pytest.raises(fl.UnsupportedModelError, match="one of 2: the replicas"):
        make(model)
    with pytest.raises(fl.UnsupportedModelError, match="one of 2: the replicas"):
        optimiser.step(batch=(x, y))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_group_of_one_process_trains(make, group):
    model, x, y = problem()
    group(1)
    before = model[0].weight.detach().clone()
    make(model).step(batch=(x, y))
    assert not torch.equal(model[0].weight, before)


def test_statistics_of_a_shard_are_local(group):
    model, x, y = problem()
    alone = fl.collect(model, (x, y), fl.Categorical())
    group(2)
    shard = fl.collect(model, (x, y), fl.Categorical())
    assert torch.equal(alone["0"].gradients, shard["0"].gradients)
