"""Laws of the report job: whole folders, equal runs, clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr

import fisherlab as fl
from fisherlab import cli, problems
from fisherlab.analysis.allowances import Allowance, cut
from fisherlab.analysis.purposes import left_out
from fisherlab.errors import DataError, NumericalError
from fisherlab.problems import Problem, descriptions
from fisherlab.problems.data import digits
from fisherlab.problems.networks import perceptron
from fisherlab.problems.problem import drawn
from fisherlab.report import analysis, figures, job, sizes
from fisherlab.report.config import ReportConfig, logarithmic
from fisherlab.report.folder import Phases, describe_run, git_commit, whole_folder
from fisherlab.report.sizes import fitted

QUICK = ReportConfig(
    problem="tiny",
    steps=4,
    checkpoints=(0, 4),
    examples=40,
    approximators=("exact", "kfac", "kpsvd", "diagonal"),
    layers=("fc2",),
    quiet=True,
)


def quick(**changes):
    return replace(QUICK, **changes)


def tiny_digits(data_dir, dtype):
    """Shrink the digits to 4 x 4 pixels, so that a report takes a moment."""

    def shrunk(pair):
        x, y = pair
        return x.reshape(-1, 4, 4, 4, 4).mean((2, 4)).flatten(1), y

    train, test = digits(data_dir, dtype)
    return shrunk(train), shrunk(test)


@pytest.fixture(scope="module", autouse=True)
def tiny_problem():
    description = replace(
        problems.describe("digits"),
        name="tiny",
        data=tiny_digits,
        build=partial(perceptron, (16, 6, 10), "tanh"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(descriptions._PROBLEMS, "tiny", description)
        yield


# --- configuration --------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_default_checkpoints_go_from_the_start_to_the_end(steps):
    checkpoints = logarithmic(steps)
    assert checkpoints[0] == 0
    assert checkpoints[-1] == steps
    assert list(checkpoints) == sorted(set(checkpoints))


def test_given_checkpoints_are_sorted_and_counted_once():
    assert ReportConfig(checkpoints=(9, 0, 9)).analysed_steps == (0, 9)


# --- the folder -----------------------------------------------------------------------


def write(out, name="new", error=None, **options):
    with whole_folder(out, out, **options) as (scratch, _):
        (scratch / "report.html").write_text(name)
        (scratch / "figures").mkdir()
        (scratch / "figures" / name).touch()
        if error is not None:
            raise error


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_folder_holds_exactly_what_was_written(tmp_path):
    write(tmp_path / "a" / "b")
    assert everything(tmp_path) == [
        "a",
        "a/b",
        "a/b/figures",
        "a/b/figures/new",
        "a/b/report.html",
    ]


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error):
        write(tmp_path / "a" / "b", error=error)
    assert everything(tmp_path) == []


def test_a_failure_leaves_an_earlier_report_alone(tmp_path):
    write(tmp_path / "out", name="old")
    before = everything(tmp_path)
    with pytest.raises(RuntimeError):
        write(tmp_path / "out", error=RuntimeError, overwrite=True)
    assert everything(tmp_path) == before
    assert (tmp_path / "out" / "report.html").read_text() == "old"


def test_a_full_folder_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        write(tmp_path)
    assert everything(tmp_path) == ["mine"]


def test_overwriting_replaces_the_report_and_keeps_other_files(tmp_path):
    out = tmp_path / "out"
    write(out, name="old")
    (out / "mine").touch()
    (out / "inverse_blocks.nc").touch()
    write(out, overwrite=True, owned=("inverse_blocks.nc",))
    assert everything(out) == ["figures", "figures/new", "mine", "report.html"]
    assert (out / "report.html").read_text() == "new"


def test_the_default_folder_is_a_new_one_each_time(tmp_path):
    targets = []
    for _ in range(3):
        with whole_folder(None, tmp_path / "reports" / "x") as (_, target):
            targets.append(target.name)
    assert targets == ["x", "x-2", "x-3"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "file")
    with pytest.raises(ValueError, match=r"file/below cannot be written.*--out"):
        write(tmp_path / "file" / "below")


def test_the_root_of_a_file_system_is_refused():
    with pytest.raises(ValueError, match="root of a file system"):
        write(job.Path("/"), overwrite=True)


# --- provenance -----------------------------------------------------------------------


def test_the_commit_is_that_of_the_folder_itself(tmp_path):
    import subprocess

    assert git_commit(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    assert git_commit(tmp_path) is None
    subprocess.run(
        [*git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True
    )
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "below").mkdir()
    assert git_commit(tmp_path / "below") is None


def test_a_run_is_described_in_json(tmp_path):
    from datetime import datetime

    config = ReportConfig(out=tmp_path, data_dir=tmp_path)
    text = json.dumps(describe_run(config, "fisherlab report", datetime(2026, 1, 1)))
    assert json.loads(text)["config"]["out"] == str(tmp_path)


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": "digit"}, "no problem 'digit'.*digits"),
        ({"approximators": ("kfca",)}, "no approximator 'kfca'.*kfac"),
        ({"device": "cuda:99"}, "no device 'cuda:99'.*cpu"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"layers": ("fc7",)}, "no layer 'fc7'.*fc1"),
    ],
)
def test_unknown_names_are_refused_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        job.run(quick(out=tmp_path / "out", **changes))
    assert everything(tmp_path) == []


def test_missing_data_files_are_refused_and_nothing_is_written(tmp_path, capsys):
    words = ["report", "--problem", "mnist", "--data-dir", str(tmp_path / "none")]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "train-images-idx3-ubyte.gz is missing" in err
    assert everything(tmp_path) == []
    with pytest.raises(DataError):
        job.run(quick(problem="mnist", data_dir=tmp_path, out=tmp_path / "out"))


def test_a_diverging_training_leaves_nothing(tmp_path):
    with pytest.raises(NumericalError, match="lr"):
        job.run(quick(lr=1e308, steps=40, checkpoints=(40,), out=tmp_path / "out"))
    assert everything(tmp_path) == []


@pytest.mark.usefixtures("one_figure")
def test_a_training_that_diverges_later_keeps_the_steps_that_are_done(tmp_path, capsys):
    words = "report --problem tiny --steps 40 --checkpoints 0,40 --lr 1e308"
    words += " --approximators kfac --quiet"
    assert cli.main([*words.split(), "--out", str(tmp_path / "out")]) == 2
    found = results(tmp_path / "out")
    assert found.step.values.tolist() == [0]
    assert "later steps" in found.attrs["left_out"]
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().err


def test_the_default_rate_is_that_of_the_mean_over_labels():
    x, y = torch.zeros(5, 3), torch.zeros(5, 4)
    problem = Problem("p", torch.nn.Linear(3, 4), fl.Gaussian(), (x, y), (x, y))
    assert analysis.learning_rate(problem, ReportConfig()) == 0.05 / 4
    assert analysis.learning_rate(problem, ReportConfig(lr=2.0)) == 2.0


# --- whole reports --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "RECIPES", figures.RECIPES[:1])
        page = job.run(quick(out=out), "fisherlab report --out out")
    assert page == out / "report.html"
    return out


@pytest.fixture
def plain_page(monkeypatch):
    """Leave out the drawing, which takes most of the time of a small report."""

    def write_page(ds, tree, folder, record):
        (folder / "report.html").touch()

    monkeypatch.setattr(job, "write_page", write_page)


def results(folder):
    return xr.load_dataset(folder / "results.nc", engine="h5netcdf")


def test_a_report_has_its_parts(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"report.html", "results.nc", "run.json", "figures"} <= names
    assert list((finished / "figures").glob("*.png"))
    assert list((finished / "figures").glob("*.pdf"))


def test_results_are_one_flat_dataset_along_the_trajectory(finished):
    ds = results(finished)
    assert set(ds.frobenius_error.dims) == {"layer", "approximator", "step"}
    assert ds.step.values.tolist() == [0, 4]
    assert ds.layer.values.tolist() == ["fc1", "fc2"]
    assert ds.approximator.values.tolist() == list(QUICK.approximators)
    assert ds.attrs["problem"] == "tiny"
    assert ds.attrs["examples"] == 40


def test_results_keep_the_order_laws(finished):
    error = results(finished).frobenius_error
    assert np.all(error.sel(approximator="exact") <= 1e-6)
    kpsvd, kfac = error.sel(approximator="kpsvd"), error.sel(approximator="kfac")
    assert np.all(kpsvd.values <= kfac.values * (1 + 1e-9))


def test_the_noise_of_the_exact_blocks_is_that_of_halves_of_the_data(finished):
    ds = results(finished)
    problem = problems.load("tiny")
    x, y = problem.train[0][:40], problem.train[1][:40]
    dense = []
    for half in (slice(0, 20), slice(20, 40)):
        stats = fl.collect(problem.model, (x[half], y[half]), problem.likelihood)
        dense.append(fl.ExactBlock()(stats["fc2"]).to_dense())
    difference = torch.linalg.matrix_norm(dense[0] - dense[1])
    expected = (difference / torch.linalg.matrix_norm(dense[0] + dense[1])).item()
    found = float(ds.noise_floor.sel(layer="fc2", step=0))
    assert expected / 2 < found < 2 * expected
    marked = ds.below_noise.sel(approximator="diagonal").values
    error = ds.frobenius_error.sel(approximator="diagonal")
    np.testing.assert_array_equal(marked == 1, (error <= ds.noise_floor).values)


def test_losses_are_those_of_the_network_that_was_trained(finished):
    ds = results(finished)
    problem = problems.load("tiny")
    x, y = problem.train
    expected = torch.nn.functional.cross_entropy(problem.model(x), y).item()
    assert float(ds.train_loss.sel(step=0)) == pytest.approx(expected, rel=1e-12)
    assert float(ds.train_loss.sel(step=4)) < expected


def test_errors_are_those_of_random_examples_by_brute_force(finished):
    """Compare with the Fisher from all labels, weighted by their probabilities."""
    model = problems.load("tiny").model
    x, _ = drawn(problems.load("tiny").train, 40, seed=0)
    last = dict(model.named_children())["fc2"]
    hidden = model[:-1](x).detach()
    inputs = torch.cat([hidden, torch.ones(40, 1)], 1)
    p = last(hidden).softmax(1).detach()
    outer = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("noq,ni,nj->oiqj", outer, inputs, inputs) / 40
    diagonal = torch.einsum("oioi->oi", fisher)
    expected = (1 - diagonal.square().sum() / fisher.square().sum()).sqrt().item()
    error = results(finished).frobenius_error
    found = float(error.sel(layer="fc2", approximator="diagonal", step=0))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_record_says_how_it_was_made(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["command"] == "fisherlab report --out out"
    assert record["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    assert {"load", "train", "collect", "compare", "page"} <= set(record["seconds"])
    assert record["interrupted"] is False


def test_inverse_blocks_are_those_asked_for(finished):
    with xr.open_datatree(finished / "inverse_blocks.nc", engine="h5netcdf") as tree:
        assert [name for name, node in tree.items() if "inverse" in node] == ["fc2"]
        assert all("eigenvalue" in node for node in tree.values()), "of every layer"
        assert tree["fc2"]["inverse"].sizes["row"] == 70


@pytest.mark.usefixtures("plain_page")
def test_two_runs_with_one_seed_give_equal_values(finished, tmp_path):
    torch.manual_seed(123)
    job.run(quick(out=tmp_path / "again"))
    xr.testing.assert_equal(results(finished), results(tmp_path / "again"))


@pytest.mark.usefixtures("plain_page")
def test_another_seed_gives_other_values(finished, tmp_path):
    job.run(quick(out=tmp_path / "other", seed=1))
    other = results(tmp_path / "other").train_loss
    assert not np.array_equal(other, results(finished).train_loss)


@pytest.mark.usefixtures("one_figure")
def test_an_interrupt_keeps_the_checkpoints_that_are_done(tmp_path, monkeypatch, capsys):
    finish = analysis._moment

    def then_interrupt(problem, model, step, *rest):
        if step > 0:
            raise KeyboardInterrupt
        return finish(problem, model, step, *rest)

    monkeypatch.setattr(analysis, "_moment", then_interrupt)
    words = "report --problem tiny --steps 4 --approximators exact,kfac --quiet"
    assert cli.main([*words.split(), "--out", str(tmp_path / "out")]) == 130
    assert results(tmp_path / "out").step.values.tolist() == [0]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["interrupted"]
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().err


def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(analysis, "_moment", interrupt)
    with pytest.raises(KeyboardInterrupt):
        job.run(quick(out=tmp_path / "out"))
    assert everything(tmp_path) == []


@pytest.mark.usefixtures("plain_page")
@pytest.mark.parametrize("fisher", ["monte-carlo", "empirical"])
def test_the_fisher_that_was_asked_for_is_used(tmp_path, fisher):
    job.run(quick(fisher=fisher, out=tmp_path / "out", checkpoints=(0,)))
    name = {"monte-carlo": "MonteCarlo", "empirical": "Empirical"}[fisher]
    assert results(tmp_path / "out").attrs["fisher"].startswith(name)


@pytest.mark.usefixtures("plain_page")
def test_a_loud_run_shows_its_phases_and_prints_a_table_and_the_path(tmp_path, capsys):
    words = "report --steps 2 --checkpoints 0 --examples 20 --layers fc2 --problem tiny"
    assert cli.main([*words.split(), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Relative Frobenius error at step 0\nlayer")
    assert out.endswith(f"\n{tmp_path / 'out' / 'report.html'}\n")
    assert "compare" in err


@pytest.mark.usefixtures("plain_page")
def test_a_quiet_run_prints_nothing(tmp_path, capsys):
    job.run(quick(checkpoints=(0,), out=tmp_path / "out"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_default_problem_gives_a_report_of_all_six_layers(tmp_path):
    config = ReportConfig(steps=2, checkpoints=(2,), quiet=True, out=tmp_path / "out")
    job.run(config)
    ds = results(tmp_path / "out")
    assert ds.layer.values.tolist() == [f"fc{k}" for k in range(1, 7)]
    assert ds.attrs["examples"] == 1438
    error = {str(n): ds.frobenius_error.sel(approximator=n) for n in ds.approximator.values}
    for smaller, larger in (
        ("kpsvd", "kfac"),
        ("kpsvd-2", "kpsvd"),
        ("kfac-corrected", "kfac"),
        ("mini-block", "diagonal"),
    ):
        assert np.all(error[smaller].values <= error[larger].values * (1 + 1e-9))


def test_the_last_moment_has_as_much_time_as_all_before_it():
    problem = fl.problems.load("digits", examples=60)
    for steps in [(5,), (0, 5), (0, 2, 3, 5)]:
        config = ReportConfig(steps=5, checkpoints=steps, examples=60, time="10 min")
        *before, last = fitted(problem, config).seconds
        assert len(before) == len(steps) - 1
        assert last == pytest.approx(sum(before), rel=0.05) or not before
    found = {}
    for time in ("1 s", "10 s", "10 min"):
        config = ReportConfig(steps=5, checkpoints=(0, 2, 5), examples=60, time=time)
        size = fitted(problem, config)
        early, last = (_left_out(problem, config, seconds) for seconds in size.seconds[1:])
        told = [one for one in size.told if one.startswith("at the moments before")]
        more = len(early - last)
        assert told == (
            [f"at the moments before the last, {more} more of these"] * (more > 0)
        )
        found[time] = size.held_out
    assert found["1 s"] < found["10 s"] < found["10 min"]


def test_moments_are_left_out_before_the_last_one_has_nothing():
    """The page of a large network showed four moments of empty tables."""
    problem = fl.problems.load("digits", examples=60)
    config = ReportConfig(steps=5, checkpoints=(0, 2, 5), examples=60, time="0.0001 s")
    size = fitted(problem, config)
    assert size.moments == (5,)
    assert "the network after 0, 2 steps of training; ask with --time" in size.told
    assert fitted(problem, replace(config, time="1 min")).moments == (0, 2, 5)
    with Phases(analysis.count_phases(config), quiet=True) as phase:
        found = analysis.analyse(problem, config, size, phase).results
    assert found["step"].values.tolist() == [5]


@pytest.mark.parametrize("time", ["1 s", "10 s"])
def test_examples_leave_the_purposes_of_closed_forms_their_time(time):
    """Two thousand examples of an autoencoder left time for the diagonal's step alone."""
    problem = fl.problems.load("digits", examples=1000)
    config = ReportConfig(steps=1, checkpoints=(1,), examples=1000, time=time)
    size = fitted(problem, config)
    assert size.examples < fitted(problem, replace(config, purpose=("matrix",))).examples
    assert any(" for the purposes" in one for one in size.told)
    x, y = problem.train
    data = x[: size.examples], y[: size.examples]
    stats = fl.collect(problem.model, data, problem.likelihood)
    gradient = fl.mean_gradient(problem.model, data, problem.likelihood)
    purposes = [fl.Step(gradient, 0.1), fl.Laplace(1.0, 1000)]
    methods = {name: fl.approximators()[name] for name in ("kfac", "diagonal")}
    limit = Allowance.of(size.judging, size.budget)
    assert not left_out(stats, methods, purposes, limit)


def test_long_sequences_go_down_to_two_examples():
    """Eight sequences of GPT-2 took the time of a report, and left its tables empty."""
    problem = fl.problems.load("digits", examples=60)
    config = ReportConfig(steps=5, examples=60, time="0.0001 s")
    size = fitted(problem, config)
    assert size.examples == 2
    assert any(one.startswith("2 examples make up the Fisher") for one in size.told)


def test_a_step_that_takes_long_has_a_smaller_batch_unless_one_is_asked_for(monkeypatch):
    problem = fl.problems.load("digits", examples=60)
    config = ReportConfig(steps=5, examples=60)
    size = fitted(problem, config)
    assert size.batch == 64
    assert not any("minibatches" in one for one in size.told)
    monkeypatch.setattr(sizes, "_STEP", 0.0)
    size = fitted(problem, config)
    assert size.batch == 8
    assert any(one.startswith("minibatches of the training hold 8") for one in size.told)
    assert fitted(problem, replace(config, batch_size=64)).batch == 64
    trained = analysis.attributes_of(problem, config, size)["training"]
    assert json.loads(trained)["batch_size"] == 8


def _left_out(problem, config, seconds):
    """Return what a comparison of a problem's examples leaves out in a time."""
    stats = fl.collect(problem.model, problem.train, problem.likelihood)
    methods = {name: fl.approximators()[name] for name in config.approximators}
    samples = {name: fl.ExactBlock()(layer).samples for name, layer in stats.items()}
    limit = Allowance.of(seconds, 2**31)
    return set(cut(samples, methods, ("matrix", "gradient", "damping"), limit).reasons)


def test_what_predicts_nothing_in_its_time_says_so():
    problem = fl.problems.load("digits", examples=60)
    said = {}
    for purpose in ("laplace", "step"):
        config = ReportConfig(steps=1, examples=60, time="0.001 s", purpose=(purpose,))
        size = fitted(problem, config)
        assert not size.held_out
        said[purpose] = any("predictive variances" in one for one in size.told)
    assert said == {"laplace": True, "step": False}
