"""Laws of `fisherlab follow` and `fisherlab tune`."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

import fisherlab as fl
from fisherlab import cli
from fisherlab.cli import follow as command

QUICK = ("--examples", "30", "--layers", "fc6", "--moments", "3")


def refused(capsys, *words):
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


def test_follow_writes_a_store_that_opens_and_goes_on(tmp_path, capsys):
    out = str(tmp_path / "run")
    words = ("follow", "--optimizer", "kfac", "--lr", "0.01", *QUICK, "--out", out)
    assert cli.main([*words, "--steps", "4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step")
    assert text.splitlines()[-1] == out
    ds = fl.open(out)
    assert ds.step.values.tolist() == [0, 2, 4]
    assert ds.frobenius_error.dims == ("step", "layer", "approximator")
    assert cli.main([*words, "--steps", "4", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == out
    assert cli.main([*words, "--steps", "4", "--json"]) == 0
    told, where = capsys.readouterr()
    assert where.splitlines()[-1] == out
    rows = json.loads(told)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert [row["test_loss"] for row in rows] == ds.test_loss.values.tolist()


def test_follow_takes_the_damping_of_either_kind(tmp_path, monkeypatch):
    seen = []
    real = fl.optimizer
    monkeypatch.setattr(
        fl, "optimizer", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1]
    )
    words = ["follow", "--optimizer", "kfac-eigen", "--steps", "1", *QUICK, "--quiet"]
    for option, expected in (("--factored", fl.Factored(0.5)), ("--damping", 0.5)):
        assert cli.main([*words, option, "0.5", "--out", str(tmp_path / option)]) == 0
        assert seen[-1].param_groups[0]["damping"] == expected


def test_follow_refuses_both_dampings_and_the_kind_that_a_recipe_has_not(capsys):
    full = ("follow", "--optimizer", "kfac-full", "--factored", "1")
    assert "LevenbergMarquardt" in refused(capsys, *full)
    err = refused(capsys, "follow", "--damping", "1", "--factored", "1")
    assert "not allowed with" in err


def test_follow_measures_everything(tmp_path, capsys):
    methods = ("--approximators", "kfac", "kfac-tridiagonal")
    probes = ("--probes", *command.PROBES, *methods, "--every", "2")
    words = ("follow", "--steps", "2", *QUICK[:4], *probes, "--quiet", "--out")
    assert cli.main([*words, str(tmp_path / "a")]) == 0
    names = {"train_loss", "frobenius_error", "averaged_direction_cosine", "eigenvalue"}
    ds = fl.open(tmp_path / "a")
    assert names | {"stale_error"} <= set(ds.data_vars)
    followed = ds.averaged_direction_cosine.sel(approximator="kfac-tridiagonal")
    assert bool(np.isfinite(followed).all())


def test_follow_takes_the_metrics_the_labels_and_the_batch_of_a_paper(tmp_path, capsys):
    words = ["follow", "--steps", "2", "--every", "2", *QUICK[:4], "--quiet"]
    words += ["--approximators", "kfac,deflation", "--probes", "errors", "--on", "batch"]
    words += ["--metrics", "frobenius_error,spectrum_error", "--fisher", "monte-carlo"]
    assert cli.main([*words, "--seed", "3", "--out", str(tmp_path / "a")]) == 0
    problem = fl.problems.load("digits", seed=3)
    probe = fl.probes.Errors(
        ["kfac", "deflation"],
        fl.MonteCarlo(1, 3),
        metrics=["frobenius_error", "spectrum_error"],
        on="batch",
        examples=30,
        layers=["fc6"],
    )
    made = fl.optimizer("sgd-momentum", problem)
    told = fl.follow(problem, made, steps=2, probes=[probe], every=2, batch_size=64, seed=3)
    found = fl.open(tmp_path / "a")
    assert {"direction_cosine", "train_loss"}.isdisjoint(found.data_vars)
    for name in ("frobenius_error", "spectrum_error"):
        np.testing.assert_allclose(found[name], told[name], rtol=1e-12)


def test_ctrl_c_leaves_130_and_says_where_everything_is(tmp_path, capsys, monkeypatch):
    from fisherlab.training.run import Run

    real = Run.advance

    def interrupted(self):
        loss = real(self)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return loss

    words = ["follow", "--steps", "4", *QUICK, "--quiet", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupted)
        assert cli.main(words) == 130
    err = capsys.readouterr().err
    assert "stopped after step 2 of 4; all is saved in" in err
    assert cli.main(words) == 0
    assert fl.open(tmp_path).step.values.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--problem", "digit"), "no problem 'digit'"),
        (("--optimizer", "adan"), "'adan' is unknown"),
        (("--optimizer", "adam", "--damping", "0.1"), "'damping' cannot be set"),
        (("--probes", "loss"), "--probes: 'loss' is none of"),
        (("--approximators", "kfak"), "'kfak' unknown"),
        (("--approximators", "kfac-tridiagonal"), "only the probe 'directions'"),
        (("--seconds", "0"), "a positive time"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--every", "0"), "positive number of steps"),
        (("--every", "2", "--moments", "3"), "not allowed with argument"),
        (("--layers", "fc9"), "fc9"),
        (("--device", "gpu"), "no device 'gpu' here. Choose from cpu"),
        (("--alpha", "-1"), "positive"),
        (("--metrics", "size"), "metrics ['size'] are unknown"),
        (("--fisher", "sampled"), "invalid choice: 'sampled'"),
    ],
)
def test_follow_refuses_in_one_line_and_writes_nothing(tmp_path, capsys, words, named):
    out = tmp_path / "run"
    err = refused(
        capsys, "follow", "--steps", "2", "--examples", "20", *words, "--out", str(out)
    )
    assert named in err
    assert not out.exists()


def test_tune_prints_the_best_and_saves_all(tmp_path, capsys):
    words = ["tune", "--optimizers", "adam", "--lr", "1e-9,0.01", "--steps", "10"]
    words += ["--out", str(tmp_path / "search")]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["optimizer", "lr", "train_loss"]
    assert lines[1].split()[:2] == ["adam", "0.01"]
    ds = fl.open(lines[-1])
    assert int(ds.best[0]) == 1
    assert ds.attrs["objective"] == "train_loss"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--optimizers", "adan"), "'adan' is none of"),
        (("--grid", "fine"), "no grid 'fine'"),
        (("--problem", "digit"), "no problem 'digit'"),
        (("--trials", "0"), "one trial"),
    ],
)
def test_tune_refuses_in_one_line(tmp_path, capsys, words, named):
    assert named in refused(capsys, "tune", *words, "--out", str(tmp_path / "search"))
    assert not (tmp_path / "search").exists()
