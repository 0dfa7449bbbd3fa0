"""Process groups: what is refused, and that one process is as none."""

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


READ = {
    "optimiser": lambda m, x, y: fl.NaturalGradient(m, fl.Categorical(), "kfac", 0.1, 0.1),
    "collect": lambda m, x, y: fl.collect(m, (x, y), fl.Categorical()),
    "mean_gradient": lambda m, x, y: fl.mean_gradient(m, (x, y), fl.Categorical()),
    "approximate": lambda m, x, y: fl.approximate(m, (x, y), fl.Categorical(), ["kfac"]),
    "compare": lambda m, x, y: fl.compare(m, (x, y), fl.Categorical(), ["kfac"]),
    "coverage": lambda m, x, y: fl.coverage(m, (x, y)),
    "estimate": lambda m, x, y: fl.estimate(m, (x, y), fl.Categorical(), ["kfac"]),
}


@pytest.mark.parametrize("call", READ)
def test_sharded_parameters_are_refused(call, group):
    tensor = pytest.importorskip("torch.distributed.tensor")
    model, x, y = problem()
    group(2)
    mesh = distributed.init_device_mesh("cpu", (2,))
    shards = tensor.distribute_tensor(model[0].weight.detach(), mesh, [tensor.Shard(0)])
    model[0].weight = nn.Parameter(shards)
    with pytest.raises(fl.UnsupportedModelError, match=r"sharded .DTensor.*Distributed"):
        READ[call](model, x, y)


def test_what_takes_one_process_says_what_works(group):
    model, x, y = problem()
    optimiser = OPTIMISERS["kfac"](model)
    group(2)
    with pytest.raises(ValueError, match="warm_start takes one process: begin without"):
        optimiser.warm_start([(x, y)])
    with pytest.raises(fl.RankError, match="one of 2: give it an executor="):
        fl.tune("digits", "adam")


def test_a_group_that_is_not_live_is_refused():
    model, x, y = problem()
    with pytest.raises(fl.RankError, match="no process group is live: call"):
        fl.approximate(model, (x, y), fl.Categorical(), ["kfac"], group="a group")


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
