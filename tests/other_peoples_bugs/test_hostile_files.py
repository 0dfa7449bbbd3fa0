"""Files and code of other people, given to the command: right, or refused in a sentence."""

import pickle

import numpy as np
import pytest
import torch

from fisherlab import cli

GOOD = "def net(): return nn.Linear(4, 2).double()\n"
FORWARD = """
class Net(nn.Module):
    def forward(self, x):
        {}
def net(): return Net()
"""
MODELS = {
    "syntax": "def net(: pass\n",
    "error-at-import": "1 / 0\n" + GOOD,
    "exit-at-import": "import sys; sys.exit(0)\n" + GOOD,
    "exit-in-call": "import sys\ndef net(): sys.exit(0)\n",
    "endless": "def net(): return net()\n",
    "key-in-forward": FORWARD.format("{}['a']"),
    "exit-in-forward": FORWARD.format("raise SystemExit(0)"),
    "other-width": "def net(): return nn.Linear(5, 2).double()\n",
}


class Hostile:
    """Code that a pickle would run."""

    def __reduce__(self):
        return open, ("hostile", "w")


def write(name):
    """Write data of 20 examples that are wrong in one way."""
    good = {"x": np.ones((20, 4)), "y": np.zeros(20, dtype=int)}
    wrong = {
        "text": {"x": np.array(["a"] * 20)},
        "scalars": {"x": np.float64(1), "y": np.float64(1)},
        "complex": {"x": np.ones((20, 4)) + 1j},
        "objects": {"x": np.array([{}] * 20)},
        "half-a-test": {"x_test": np.ones((3, 4))},
    }
    np.savez(f"{name}.npz", **good | wrong.get(name, {}))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("good")
    return tmp_path


def refused(here, capsys, model, data):
    (here / "m.py").write_text("from torch import nn\n" + model)
    words = ["report", "--model", "m.py:net", "--data", data, "--out", "out"]
    code = cli.main(words)
    told = capsys.readouterr().err
    assert code == 2
    assert told.startswith("fisherlab: --")
    assert told.count("\n") == 1
    assert not (here / "out").exists()
    return told


@pytest.mark.parametrize("model", MODELS)
def test_code_of_a_model_that_fails_or_exits_never_ends_with_0(here, capsys, model):
    assert "m.py:net failed" in refused(here, capsys, MODELS[model], "good.npz")


@pytest.mark.parametrize("name", ["text", "scalars", "complex", "objects", "half-a-test"])
def test_data_that_are_no_real_numbers_are_named(here, capsys, name):
    write(name)
    assert f"--data {name}.npz" in refused(here, capsys, GOOD, f"{name}.npz")


@pytest.mark.parametrize("length", [0, 1, 4, 30, 200, 400])
def test_data_cut_short_are_named(here, capsys, length):
    whole = (here / "good.npz").read_bytes()
    (here / "cut.npz").write_bytes(whole[:length])
    assert "--data cut.npz cannot be read" in refused(here, capsys, GOOD, "cut.npz")


@pytest.mark.parametrize("how", ["junk", "torch", "pickle"])
def test_pickled_code_is_refused_and_not_run(here, capsys, how):
    if how == "torch":
        torch.save({"x": Hostile(), "y": 1}, "bad.pt")
    else:
        (here / "bad.pt").write_bytes(pickle.dumps(Hostile()) if how == "pickle" else b"j")
    assert "--data bad.pt cannot be read" in refused(here, capsys, GOOD, "bad.pt")
    assert not (here / "hostile").exists()


def test_a_model_is_tried_on_a_copy_with_generators_as_they_were():
    from fisherlab.report import own
    from fisherlab.report.config import ReportConfig

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    own._try(model, torch.randn(2, 4, generator=torch.Generator()), ReportConfig())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_numbers_of_numpy_are_read_in_the_precision_of_a_model_of_torch(here, capsys):
    (here / "m.py").write_text("from torch import nn\ndef net(): return nn.Linear(4, 2)\n")
    assert cli.main(["estimate", "--model", "m.py:net", "--data", "good.npz"]) == 0
    assert "weight" in capsys.readouterr().out
