"""Training on the device: steps, budgets of waiting, runs that stop, move and go on."""

import copy

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.training import probes
from fisherlab.training.loop import take_step
from tests import cases, simulated_device, training_runs
from tests.on_device.both import LIKELIHOOD, assert_same, data, network

pytestmark = pytest.mark.device
REGISTERED = fl.approximators() | fl.preconditioners() | fl.network_approximators()
HELD = ("exact", "exact-network", "low-rank", "cg-fac", "k-bfgs", "k-bfgs-l")
QUICK = ("kfac", "ekfac", "kpsvd-2", "mini-block", "soap-mean", "k-bfgs", "khatri-rao")


def skip_if_bases_are_arbitrary(name, device):
    """Adam in an eigenbasis of few examples: who finds it chooses that of a null space."""
    if name.startswith("soap") and device.type != "sim":
        pytest.skip("another eigensolver chooses another basis of the null space")


def normed():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def convolutional():
    conv = nn.Conv2d(2, 4, 2, groups=2)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def attentive():
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))


NETS = {normed: (5,), convolutional: (2, 3, 3), attentive: (3, 4)}


def weights(model):
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def optimiser(model, name, **settings):
    chosen = {"lr": 0.1, "damping": 0.1, "average": 0.0 if name in HELD else 0.9}
    return fl.NaturalGradient(model, LIKELIHOOD, REGISTERED[name], **(chosen | settings))


def trained(name, device, steps=4, **settings):
    """Take some steps, half of which renew nothing."""
    model = network().to(device)
    x, y = (part.to(device) for part in data())
    chosen = optimiser(model, name, statistics_every=2, inverse_every=2, **settings)
    losses = [chosen.step(batch=(x, y)) for _ in range(steps)]
    assert losses[0].device.type == torch.device(device).type
    return weights(model) | {"losses": torch.stack(losses).cpu()}, chosen


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in REGISTERED],
)
def test_steps_with_every_method(name, device):
    skip_if_bases_are_arbitrary(name, device)
    (host, _), (here, chosen) = trained(name, "cpu"), trained(name, device)
    assert_same(host, here)
    assert {u.operator.device.type for u in chosen.units.values()} == {device.type}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"momentum_of": "gradient"},
    {"clip": fl.KLClip(1e-3)},
    {"weight_decay": 0.1},
    {"fisher": fl.Exact()},
    {"fisher": fl.Empirical()},
    {"statistics_fraction": 0.5},
    {"damping": fl.RelativeDamping(1.0)},
    {"damping": fl.Factored(0.1)},
], ids=str)  # fmt: skip
def test_settings_of_a_step(settings, device):
    host, here = trained("kfac", "cpu", **settings), trained("kfac", device, **settings)
    assert_same(host[0], here[0])


@pytest.mark.parametrize("make", NETS)
def test_layers(make, device):
    def work(place):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make().double().to(place)
        x, y = cases.normal(12, *NETS[make], seed=1).to(place), data()[1].to(place)
        with torch.no_grad():
            model(x)  # running averages have seen a batch
        chosen = fl.NaturalGradient(
            model, LIKELIHOOD, "kfac", lr=0.1, damping=0.1, fallback="diagonal"
        )
        for _ in range(3):
            chosen.step(batch=(x, y))
        return {n: t.cpu() for n, t in model.state_dict().items()}

    assert_same(work("cpu"), work(device))


EACH_EIGHTH = [
    pytest.param(name, marks=[pytest.mark.slow] * (k % 8 > 0))
    for k, name in enumerate(fl.optimizers())
]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("name", EACH_EIGHTH)
def test_every_recipe(name, device):
    skip_if_bases_are_arbitrary(name, device)

    def work(place):
        problem = training_runs.small().to(place)
        chosen = fl.optimizer(name, problem)
        losses = [take_step(problem, chosen, problem.train, k) for k in range(1, 4)]
        return weights(problem.model) | {"losses": torch.tensor(losses)}

    assert_same(work("cpu"), work(device))


# --- what a step moves and waits for ---


@pytest.fixture
def simulated(device):
    if device.type != "sim":
        pytest.skip("the simulated device counts")
    return device


def moves_of(name, device, step):
    x, y = (part.to(device) for part in data())
    chosen = optimiser(network().to(device), name, statistics_every=3, inverse_every=3)
    for _ in range(step):
        chosen.step(batch=(x, y))
    with simulated_device.counted() as moves:
        chosen.step(batch=(x, y))
    return moves


ITERATED = {"cg-fac", "deflation", "kfac-corrected", "kfac-tridiagonal", "lanczos-2"}
ITERATED |= {"lanczos-paper", "kpsvd-2", "kpsvd-3", "kpsvd-4"}
COARSE = {"two-level-kfac-krylov", "two-level-kfac-residual"}  # a basis of each gradient


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in REGISTERED],
)
def test_a_step_between_renewals_waits_for_nothing(name, simulated):
    moves = moves_of(name, simulated, 4)
    if name in ITERATED:  # a look an iteration of each block, and one at its end
        assert 0 < moves.to_host < 80
        assert moves.bytes_to_host == 2 * moves.to_host
        assert moves.scalars <= 2
        assert moves.waits == moves.to_device == 0
    elif name in COARSE:
        assert moves.synchronisations <= 12
        assert moves.to_device == moves.to_host == 0
    else:
        assert moves == simulated_device.Moves(), moves.lines


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
@pytest.mark.parametrize("settings", [
    {}, {"momentum_of": "gradient"}, {"weight_decay": 0.1}, {"fisher": fl.Exact()},
], ids=str)  # fmt: skip
def test_nor_with_any_likelihood_or_setting(likelihood, settings, simulated):
    kind = cases.LIKELIHOODS[likelihood]
    model, (x, _) = network().to(simulated), data()
    batch = x.to(simulated), cases.labels(kind, (12, 3)).to(simulated)
    chosen = fl.NaturalGradient(
        model, kind, "kfac", 0.1, 0.1, statistics_every=3, inverse_every=3, **settings
    )
    chosen.step(batch=batch)
    with simulated_device.counted() as moves:
        loss = chosen.step(batch=batch)
    assert moves == simulated_device.Moves(), moves.lines
    assert loss.device == simulated


RENEWAL = {  # most synchronisations of a renewal, two layers: what the method looks at
    "kfac": 22, "ekfac": 22, "tkfac": 24, "foof": 22, "mini-block": 12, "diagonal": 12,
    "exact": 12, "adam": 12, "shampoo-mean": 20, "kfac-block-diagonal": 22, "kpsvd": 110,
}  # fmt: skip


@pytest.mark.parametrize("name", RENEWAL)
def test_a_renewal_waits_no_more_than_its_budget(name, simulated):
    moves = moves_of(name, simulated, 3)
    assert moves.synchronisations <= RENEWAL[name], moves.lines
    assert moves.to_device <= 1, moves.lines  # the uniform numbers that draw the labels
    assert moves.bytes_to_device <= 12 * 8


def test_a_batch_of_the_host_is_sent_once(simulated):
    x, y = data()
    chosen = optimiser(network().to(simulated), "kfac", statistics_every=3, inverse_every=3)
    chosen.step(batch=(x, y))
    with simulated_device.counted() as moves:
        chosen.step(batch=(x, y))
    sent = x.nbytes + y.nbytes
    assert moves == simulated_device.Moves(to_device=2, bytes_to_device=sent), moves.lines


# --- looks that are postponed ---


def spoilt(kind):
    x, y = data()
    if kind == "loss":
        x = x.clone()
        x[3, 1] = 1e300
        return x * 1e300, y
    return x, y.clone().index_fill_(0, torch.tensor([2]), 7)


@pytest.mark.parametrize("kind", ["loss", "labels"])
@pytest.mark.parametrize("settings", [
    {}, {"momentum_of": "gradient"}, {"weight_decay": 0.1, "momentum": 0.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tell", ["step", "state_dict", "copy"])
def test_what_is_wrong_between_renewals_moves_nothing_and_is_told(
    kind, settings, tell, device
):
    model = network().to(device)
    good = tuple(part.to(device) for part in data())
    bad = tuple(part.to(device) for part in spoilt(kind))
    chosen = optimiser(model, "kfac", statistics_every=3, inverse_every=3, **settings)
    chosen.step(batch=good)
    before = weights(model)
    state = {k: v["momentum"].clone() for k, v in chosen.state.items() if v}
    chosen.step(batch=bad)  # nothing is looked at
    assert_same(before, weights(model))
    assert all(torch.equal(chosen.state[k]["momentum"], v) for k, v in state.items())
    chosen.step(batch=good)
    after = weights(model)
    assert not torch.equal(before["0.weight"], after["0.weight"])
    telling = {
        "step": lambda: chosen.step(batch=good),
        "state_dict": chosen.state_dict,
        "copy": lambda: copy.deepcopy(chosen),
    }
    error = fl.NumericalError if kind == "loss" else ValueError
    with pytest.raises(error, match="NaN or infinity" if kind == "loss" else "0 to 7"):
        telling[tell]()
    assert_same(after, weights(model))
    chosen.look()
    telling[tell]()  # once is enough


# --- following ---

PROBES = [
    probes.Losses(),
    probes.Errors(["kfac", "kpsvd-2", "diagonal"], damping=0.1),
    probes.Directions(["kfac", "mini-block"]),
    probes.Staleness(["kfac"], refresh_every=2),
    probes.Spectra(["kfac"]),
]


def followed(place, steps, store=None, optimizer="kfac-koroko", **options):
    problem = training_runs.small().to(place)
    chosen = {"every": 2, "batch_size": 16, "probes": PROBES, "store": store}
    found = fl.follow(problem, optimizer, steps=steps, **(chosen | options))
    return found, weights(problem.model)


@pytest.mark.slow
def test_a_run_and_its_probes(device):
    host, here = followed("cpu", 4), followed(device, 4)
    assert_same(host[0].drop_attrs(), here[0].drop_attrs())
    assert_same(host[1], here[1])


MORE = ("kfac", "kpsvd-koroko", "soap", "k-bfgs", "shampoo", "mbf")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stays", "to the host", "to the device"])
@pytest.mark.parametrize(
    "optimizer",
    [
        "kfac-koroko",
        training_runs.adam,
        *(pytest.param(n, marks=pytest.mark.slow) for n in MORE),
    ],
    ids=lambda o: o if isinstance(o, str) else o.__name__,
)
def test_a_run_is_stopped_and_goes_on_there_or_elsewhere(way, optimizer, device, tmp_path):
    skip_if_bases_are_arbitrary(str(optimizer), device)
    first = "cpu" if way == "to the device" else device
    second = "cpu" if way == "to the host" else device
    followed(first, 3, tmp_path, optimizer)
    found, moved = followed(second, 6, tmp_path, optimizer)
    whole, expected = followed("cpu", 6, None, optimizer)
    assert_same(expected, moved)
    for name in ("train_loss", "test_loss"):
        assert_same(whole[name].values.tolist()[-1], found[name].values.tolist()[-1])


@pytest.mark.parametrize("way", [("cpu", "sim"), ("sim", "cpu")], ids=" to ".join)
def test_a_short_run_moves(way, simulated, tmp_path):
    for place, steps in zip(way, (2, 4), strict=True):
        _, moved = followed(place, steps, tmp_path, probes=[probes.Losses()])
    _, expected = followed("cpu", 4, probes=[probes.Losses()])
    assert_same(expected, moved)


def test_dropout_draws_from_the_device_and_leaves_its_generator(device):
    module = torch.get_device_module(device)
    before = module.get_rng_state(device)
    runs = []
    for _ in range(2):
        problem = training_runs.small(dropout=0.5).to(device)
        fl.follow(problem, training_runs.adam, steps=3, every=3, batch_size=16)
        runs.append(weights(problem.model))
    assert_same(*runs)
    assert torch.equal(before, module.get_rng_state(device))


@pytest.mark.slow
def test_a_search_of_settings(device, tmp_path):
    def best(place, folder):
        problem = training_runs.small().to(place)
        return fl.tune(
            problem, ["sgd-momentum", "kfac-koroko"], steps=3, store=tmp_path / folder
        )

    host, here = best("cpu", "host"), best(device, "here")
    assert_same(host.drop_attrs(), here.drop_attrs())
