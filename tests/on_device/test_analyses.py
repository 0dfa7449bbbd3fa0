"""Analyses, purposes and commands on the device give what they give on the host."""

import pytest
import torch

import fisherlab as fl
from fisherlab.catalogue import METRICS
from fisherlab.cli import main
from fisherlab.numerics.devices import available_devices
from fisherlab.problems.problem import CropAndFlip, drawn
from tests import training_runs
from tests.cases import METHODS
from tests.on_device.both import LIKELIHOOD, assert_same, data, network, on_both

pytestmark = pytest.mark.device
FEW = ["kfac", "ekfac", "kpsvd-2", "mini-block", "diagonal"]


def stats(model, x, y, **options):
    return fl.collect(model, (x, y), LIKELIHOOD, **options)


def gradient(model, x, y):
    return fl.mean_gradient(model, (x, y), LIKELIHOOD)


def judged(model, x, y):
    weights = dict(model.named_parameters())
    held = stats(model, x, y)
    queries = stats(model, x[:3], y[:3], fisher=fl.Empirical())
    others = [{n: p + 0.1 for n, p in weights.items()}]
    return fl.compare(
        held,
        FEW,
        purpose=[
            fl.Step(gradient(model, x, y), damping=1e-2),
            fl.Laplace(1.0, 12, held_out=fl.HeldOut.of(model, (x[:4], y[:4]))),
            fl.Influence(0.1, queries, stats(model, x, y, fisher=fl.Empirical())),
            fl.Pruning(weights),
            fl.EWC(weights, others),
            fl.Sharpness(),
            fl.Matrix(),
        ],
    )


ANALYSES = {
    "all metrics": lambda m, x, y: fl.compare(
        stats(m, x, y), FEW, metrics=list(METRICS), damping=[0.1, 1.0],
        gradient=gradient(m, x, y),
    ),
    "relative damping": lambda m, x, y: fl.compare(
        stats(m, x, y), list(METHODS), damping=fl.RelativeDamping(1.0)
    ),
    "factored damping": lambda m, x, y: fl.compare(
        stats(m, x, y), ["kfac", "kpsvd-2"], damping=fl.Factored(0.1)
    ),
    "from a model": lambda m, x, y: fl.compare(
        m, (x, y), LIKELIHOOD, ["kfac", "kpsvd-2"], budget="1 GiB"
    ),
    "purposes": judged,
    "networks": lambda m, x, y: fl.compare_networks(
        stats(m, x, y, compress=False), damping=0.1
    ),
    "sweep": lambda m, x, y: fl.sweep(stats(m, x, y), FEW),
    "decompose": lambda m, x, y: fl.decompose(m, (x, y), LIKELIHOOD, ["kfac", "kpsvd"]),
    "uncertainty": lambda m, x, y: fl.uncertainty(
        m, (x, y), LIKELIHOOD, ["kfac"], fisher=fl.MonteCarlo(1)
    ),
    "inverse blocks": lambda m, x, y: fl.inverse_blocks(
        stats(m, x, y), ["kfac", "exact"], damping=0.1
    ),
    "pareto": lambda m, x, y: fl.pareto(stats(m, x, y), ["kfac", "diagonal"]).sel(
        cost=["stored_bytes"]  # seconds differ from run to run
    ),
    "rank curve": lambda m, x, y: fl.rank_curve(stats(m, x, y)),
    "spectra": lambda m, x, y: fl.spectra(stats(m, x, y), ["kfac", "exact"]),
    "density": lambda m, x, y: fl.density(stats(m, x, y), ["kfac", "exact"]),
    "structure": lambda m, x, y: fl.structure(stats(m, x, y)),
    "cross block": lambda m, x, y: fl.cross_block(
        stats(m, x, y, compress=False), "0", "2"
    ),
    "full matrix": lambda m, x, y: fl.full_matrix(stats(m, x, y, compress=False)),
    "coverage": lambda m, x, y: str(fl.coverage(m, (x, y))),
    "streamed": lambda m, x, y: {
        name: found["0"]
        for name, found in fl.approximate(
            m, [(x[:7], y[:7]), (x[7:], y[7:])], LIKELIHOOD, [*FEW, "kpsvd", "tkfac"]
        ).items()
    },
}  # fmt: skip
FIRST = ("purposes", "structure")
QUICK = ("all metrics", "purposes", "networks", "inverse blocks", "streamed", "sweep")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in ANALYSES]
)
def test_an_analysis(name, device):
    host, here = on_both(ANALYSES[name], device)
    if hasattr(host, "drop_attrs"):
        host, here = host.drop_attrs(), here.drop_attrs()
    assert_same(host, here)


# --- a default device ---


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n not in FIRST))
        for n in ANALYSES
        if n != "coverage"
    ],
)
def test_a_default_device_clashes_with_nothing(name, place, device):
    """Neither with a model of the host, nor with generators of the host."""
    x, y = data()
    expected = ANALYSES[name](network(), x, y)
    where = torch.device("cpu") if place == "host" else device
    model, batch = network().to(where), (x.to(where), y.to(where))
    torch.set_default_device(device)
    try:
        found = ANALYSES[name](model, *batch)
    finally:
        torch.set_default_device(None)
    if hasattr(found, "drop_attrs"):
        expected, found = expected.drop_attrs(), found.drop_attrs()
    assert_same(expected, found)


@pytest.mark.parametrize("name", ["kfac-koroko", "kpsvd-koroko", "adam"])
def test_nor_in_training(name, device):
    problems = [training_runs.small().to(device) for _ in range(2)]

    def work():
        problem = problems.pop()
        found = fl.follow(problem, name, steps=3, every=3, batch_size=16)
        return found.test_loss.values.tolist()

    expected = work()
    torch.set_default_device(device)
    try:
        assert_same(dict(enumerate(expected)), dict(enumerate(work())))
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", ["digits", "prose-gpt"])
def test_nor_with_a_problem_that_is_loaded_and_cut(name, device):
    def work():
        problem = fl.problems.load(name, examples=9)
        parts = [*problem.train, *drawn(problem.train, 4), *problem.model.parameters()]
        assert {part.device.type for part in parts} == {"cpu"}  # until it is moved
        return dict(enumerate(parts))

    expected = work()
    torch.set_default_device(device)
    try:
        assert_same(expected, work())
    finally:
        torch.set_default_device(None)


def test_images_are_moved_and_mirrored_under_a_default_device(device):
    change, x = CropAndFlip(2, True, (0.0,)), torch.rand(3, 1, 8, 8)

    def work():
        return change(x, torch.Generator("cpu").manual_seed(0))

    expected = work()
    torch.set_default_device(device)
    try:
        assert torch.equal(work(), expected)
    finally:
        torch.set_default_device(None)


# --- commands ---


def test_the_devices_that_are_here_are_named(device):
    assert available_devices()[:3] == ("cpu", device.type, f"{device.type}:0")


@pytest.mark.parametrize(
    "words", [["follow"], ["report"], ["reproduce", "kfac-figure-3"]], ids=lambda w: w[0]
)
def test_a_device_that_is_not_here_is_refused(words, device, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*words, "--device", "abacus", "--out", str(out)]) == 2
    assert (
        f"no device 'abacus' here. Choose from cpu, {device.type}"
        in capsys.readouterr().err
    )
    assert not out.exists()


def test_follow_on_the_device_and_on_with_it_on_the_host(device, tmp_path):
    words = ["follow", "--optimizer", "kfac-koroko", "--every", "2", "--probes", "losses"]
    words += ["--out", str(tmp_path / "run")]
    assert main([*words, "--steps", "2", "--device", device.type]) == 0
    assert main([*words, "--steps", "4", "--device", "cpu"]) == 0
    found = fl.open(tmp_path / "run")
    assert found.step.values.tolist() == [0, 2, 4]
    assert main([*words[:-1], str(tmp_path / "host"), "--steps", "4"]) == 0
    whole = fl.open(tmp_path / "host")
    assert_same(*(ds[["test_loss"]].drop_attrs() for ds in (whole, found)))


@pytest.mark.slow
def test_a_report_on_the_device(device, tmp_path, one_figure):
    found = {}
    for place in ("cpu", device.type):
        out = tmp_path / place
        words = ["report", "--steps", "4", "--checkpoints", "0", "4", "--examples", "30"]
        words += ["--approximators", "kfac", "kpsvd", "diagonal", "--out", str(out)]
        assert main([*words, "--device", place]) == 0
        found[place] = fl.open(out / "results.nc")
        assert (out / "report.html").exists()
    names = ["frobenius_error", "cosine_similarity"]
    assert_same(*(ds[names].drop_attrs() for ds in found.values()))
