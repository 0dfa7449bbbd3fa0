"""Every approximation on the device: its operator is there, and is that of the host."""

from functools import cache

import pytest
import torch

import fisherlab as fl
from fisherlab.numerics import packed
from fisherlab.numerics.devices import free_bytes
from tests import cases, simulated_device
from tests.cases import METHODS, normal
from tests.on_device.both import LIKELIHOOD, assert_same, data, network, on_both

pytestmark = pytest.mark.device
NETWORKS = fl.network_approximators()
OTHERS = {
    "low-rank b-kfac": fl.BKFAC(2),
    "corrected b-kfac": fl.BKFAC(2, refresh=fl.Correction(2)),
    "passes": fl.KPSVD(2, fl.Passes()),
    "power": fl.KPSVD(1, fl.Power()),
    "subspace": fl.KPSVD(2, fl.Subspace()),
    "sample gram": fl.KPSVD(2, fl.SampleGram()),
    "dense svd": fl.KPSVD(2, fl.DenseSVD()),
    "tiles": fl.MiniBlock(partition=fl.ByTile(2, 2)),
    "singd": fl.SINGD(),
}


@cache
def statistics(layer, fisher, place):
    case = cases.LAYERS[layer]
    model, x, y = cases.data(case, LIKELIHOOD)
    model, batch = model.to(place), (x.to(place), y.to(place))
    kind = cases.FISHERS[fisher]
    return fl.collect(model, batch, LIKELIHOOD, kind, layers=[case.block])[case.block]


def factored(operator, w):
    """The product with the inverse under factored damping, of those that have factors."""
    try:
        return operator.inverse(fl.Factored(0.3)) @ w
    except (ValueError, fl.NumericalError):
        return w


def stands(operator, place):
    """What an operator says, each question once."""
    w = normal(2, *operator.weight_shape, seed=5).to(place)
    found = {
        "dense": operator.to_dense(),
        "product": operator @ w,
        "diagonal": operator.diagonal(),
        "trace": operator.trace(),
        "norm": operator.frobenius_norm(),
        "eigenvalues": operator.eigenvalues(),
        "form": operator.quadratic_form(w[0]),
        "solve": operator.solve(w[0], 0.3),
        "rows": operator.take_rows([0, 1]),
        "top": operator.top_eigenvalues(2),
        "inner": operator.inner(operator),
        "inverse": operator.inverse(0.3) @ w,
        "formed inverse": operator.inverse(0.3).to_dense(),
        "rows of the inverse": operator.inverse(0.3).take_rows([1]),
        "factored": factored(operator, w),
        "logdet": operator.logdet(0.3),
        "single": operator.to(torch.float32).to(torch.float64).trace(),
        "scipy": torch.as_tensor(operator.to_scipy() @ w[0].flatten().cpu().numpy()),
    }
    tensors = [n for n, v in found.items() if isinstance(v, torch.Tensor) and n != "scipy"]
    assert {found[n].device.type for n in tensors} == {torch.device(place).type}
    return found


@pytest.mark.parametrize(
    "layer", ["conv strided padded", pytest.param("norm", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_the_same_operator(name, layer, device):
    host, here = (statistics(layer, "exact", place) for place in ("cpu", device))
    try:
        expected = METHODS[name](host)
    except fl.NeedsSharedForm:
        with pytest.raises(fl.NeedsSharedForm):
            METHODS[name](here)
        return
    assert_same(stands(expected, "cpu"), stands(METHODS[name](here), device))


@pytest.mark.slow
@pytest.mark.parametrize("fisher", cases.FISHERS)
@pytest.mark.parametrize("layer", cases.LAYERS)
@pytest.mark.parametrize("name", METHODS | OTHERS)
def test_every_method_on_every_layer_and_fisher(name, layer, fisher, device):
    method = (METHODS | OTHERS)[name]
    host, here = (statistics(layer, fisher, place) for place in ("cpu", device))
    try:
        expected = method(host)
    except (fl.NeedsSharedForm, ValueError) as refused:
        with pytest.raises(type(refused)):
            method(here)
        return
    found = method(here)
    assert found.device == here.samples.device
    assert_same(expected, found)
    previous = method(here, previous=found) if name in METHODS else found
    assert_same(expected, previous)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("shape", [(70, 5), (3, 80)], ids=str)
def test_a_block_is_packed_and_spread_in_few_calls(shape, columns, device):
    """Several pieces of rows and of inputs, with one column and with several."""
    (o, m), n = shape, 7
    gradients, inputs = normal(columns, n, o, seed=1), normal(n, m, seed=2)
    blocks = [
        packed.kronecker_sum_(x.new_empty(o, m, o, m), g, x, 0.5)
        for g, x in ((gradients, inputs), (gradients.to(device), inputs.to(device)))
    ]
    expected = 0.5 * torch.einsum("vno,vnp,ni,nj->oipj", *[gradients] * 2, *[inputs] * 2)
    assert_same(expected, blocks[0])
    assert_same(expected, blocks[1])
    host, here = (packed.rearranged(g, x) for g, x in ((gradients, inputs), (
        gradients.to(device), inputs.to(device))))  # fmt: skip
    assert_same(host, here)


@pytest.mark.parametrize("size", [5, 130, 2 * packed.LEAF + 3])
def test_a_symmetric_product_is_one_panel(size, device):
    rows = normal(4, size, seed=3)
    assert_same(rows.T @ rows, packed.second_moment(rows.to(device)))


@pytest.mark.parametrize("name", OTHERS)
def test_methods_beside_the_register(name, device):
    host, here = (statistics("linear", "exact", place) for place in ("cpu", device))
    assert_same(OTHERS[name](host), OTHERS[name](here))


@pytest.mark.parametrize("chain", ["symmetric", "stationary"])
def test_chains_of_positions(chain, device):
    method = fl.RecurrentKFAC(chain=chain)
    host, here = (statistics("tokens", "exact", place) for place in ("cpu", device))
    expected, found = (stands_inverse(method(s)) for s in (host, here))
    assert_same(expected, found)


def stands_inverse(operator):
    """The matrix of an operator and of its damped inverses."""
    inverses = [operator.inverse(damping) for damping in (0.3, fl.Factored(0.3))]
    return {"dense": operator.to_dense()} | dict(enumerate(i.to_dense() for i in inverses))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_of_the_network(name, device):
    def work(model, x, y):
        stats = fl.collect(model, (x, y), LIKELIHOOD, compress=False)
        operator = NETWORKS[name](stats)
        w = {
            n: torch.ones(s, device=x.device).double()
            for n, s in operator.weight_shapes.items()
        }
        return {
            "dense": operator.to_dense(),
            "product": operator @ w,
            "inverse": operator.inverse(0.3) @ w,
            "trace": operator.trace(),
            "norm": operator.frobenius_norm(),
        }

    assert_same(*on_both(work, device))


@pytest.mark.slow
@pytest.mark.parametrize("name", fl.preconditioners())
def test_every_preconditioner_of_the_mean_gradient(name, device):
    method = fl.preconditioners()[name]
    if hasattr(method, "observe"):
        pytest.skip("learns from steps: see the optimisers")

    def work(model, x, y):
        found = method(fl.mean_gradient(model, (x, y), LIKELIHOOD)["0"])
        assert found.device == x.device
        return found.inverse(0.3) @ torch.ones(4, 6, device=x.device).double()

    assert_same(*on_both(work, device))


@pytest.mark.parametrize("fisher", cases.FISHERS)
@pytest.mark.parametrize("layer", cases.LAYERS)
def test_statistics(layer, fisher, device):
    host, here = (statistics(layer, fisher, place) for place in ("cpu", device))
    for name in ("inputs", "gradients", "matrices"):
        kept = getattr(host, name)
        assert (kept is None) == (getattr(here, name) is None)
        if kept is not None:
            assert getattr(here, name).device == here.samples.device
    assert_same(host.example_gradients(), here.example_gradients())
    assert_same(cases.METHODS["exact"](host), cases.METHODS["exact"](here))


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_likelihoods_with_missing_labels(kind, device):
    likelihood = cases.LIKELIHOODS[kind]

    def work(model, x, y):
        labels = cases.labels(likelihood, (12, 3)).to(x.device)
        labels[1, 2] = float("nan")
        stats = fl.collect(model, (x, labels), likelihood, fl.MonteCarlo(2))
        return {
            "block": METHODS["exact"](stats["0"]),
            "loss": likelihood.loss(model(x), labels).detach(),
        }

    assert_same(*on_both(work, device))


def test_data_of_the_host_are_moved_and_the_model_stays(device):
    x, y = data()
    here = network().to(device)
    found = fl.collect(here, [(x[:7], y[:7]), (x[7:], y[7:])], LIKELIHOOD)
    assert found["0"].samples.device == device
    assert {p.device for p in here.parameters()} == {device}
    expected = fl.collect(network(), (x, y), LIKELIHOOD)
    assert_same(METHODS["kfac"](expected["0"]), METHODS["kfac"](found["0"]))
    streamed = fl.approximate(here, [(x, y)], LIKELIHOOD, ["kfac", "kpsvd"])
    assert streamed["kpsvd"]["0"].device == device


def test_the_budget_is_half_of_what_is_free_there(device):
    if device.type != "sim":
        pytest.skip("of a device whose memory can be set")
    x, y = data(400)
    held = 1_000_000
    free, whole = torch.accelerator.get_memory_info(0)
    with simulated_device.capacity(whole - free + held):
        assert free_bytes(device) == held
        told = fl.estimate(network(), (x, y), LIKELIHOOD, ["kfac"])
        assert told.budget > 100 * held  # of the host
        told = fl.estimate(network().to(device), (x, y), LIKELIHOOD, ["kfac"])
        assert told.budget < held / 2
