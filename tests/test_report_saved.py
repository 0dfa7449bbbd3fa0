"""Reports of what is at hand: a saved result, one's own model, two runs."""

import html
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import fisherlab as fl
from fisherlab import cli
from fisherlab.report import analysis, figures, own
from fisherlab.report.config import ReportConfig
from fisherlab.report.sizes import fitted
from fisherlab.report.two_runs import Run, together
from tests.datasets import comparison, inverses

SMALL = {"fc": (3, 4), "out": (2, 4)}
OWN = """
import torch
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3),
                               torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(30, 4, generator=generator, dtype=torch.float64)
    return x, (x.sum(1) > 2).long()
def broken():
    raise RuntimeError("two\\nlines")
number = 3
net, pair = model(), data()
pairs = torch.utils.data.TensorDataset(*pair)
loader = torch.utils.data.DataLoader(pairs, batch_size=8)
lonely = torch.utils.data.DataLoader(pair[0], batch_size=8)
several, named, unlabelled = (pair, pair[1]), ({"a": pair[0]}, pair[1]), (pair[0], None)
"""


pytestmark = pytest.mark.usefixtures("one_figure")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own.py").write_text(OWN)
    return tmp_path


def words(page):
    text = re.sub(r"<(style|script).*?</\1>", " ", page.read_text("utf-8"), flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def refused(capsys, *arguments):
    assert cli.main([str(word) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


# --- a saved result ---------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    ds = comparison(layers=SMALL, steps=(0, 9))
    run = {"command": "fisherlab report --seed 5"}
    return fl.report.write(ds, tmp_path / "run", inverses=inverses(SMALL), run=run).parent


def test_a_written_report_holds_its_numbers_and_how_they_came_about(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {
        "report.html",
        "results.nc",
        "inverse_blocks.nc",
        "run.json",
        "figures",
    }
    xr.testing.assert_identical(
        fl.open(saved / "results.nc"), comparison(layers=SMALL, steps=(0, 9))
    )
    record = json.loads((saved / "run.json").read_text())
    assert record["command"] == "fisherlab report --seed 5"
    assert record["versions"]["torch"] == torch.__version__


def test_rebuilding_gives_the_same_page_in_its_place(saved, capsys):
    page = saved / "report.html"
    before = page.read_text()
    page.write_text("spoilt")
    (saved / "figures" / "old.png").touch()
    (saved / "mine.txt").touch()
    assert cli.main(["report", str(saved / "results.nc")]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text() == before
    assert not (saved / "figures" / "old.png").exists()
    assert (saved / "mine.txt").exists()


def test_a_rebuilt_report_elsewhere_takes_its_numbers_along(saved, tmp_path):
    page = fl.report.rebuild(saved, tmp_path / "elsewhere")
    assert {path.name for path in page.parent.iterdir()} == {
        path.name for path in saved.iterdir()
    }
    assert page.read_text() == (saved / "report.html").read_text()


def test_a_result_outside_of_a_report_gets_a_new_folder(here, capsys):
    fl.save(comparison(layers=SMALL), here / "mine.nc")
    assert cli.main(["report", "mine.nc"]) == 0
    page = here / capsys.readouterr().out.strip()
    assert page.parent.parent == here / "reports"
    assert sorted(path.name for path in here.glob("*.*")) == ["mine.nc", "my_own.py"]


def test_purposes_alone_are_refused_in_words(tmp_path):
    data = torch.rand(9, 3).double(), None
    stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    found = fl.compare(stats, ["kfac"], purpose=[fl.Sharpness()])
    with pytest.raises(ValueError, match="a table of purposes alone was given"):
        fl.report.write(found, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_rebuilt_is_refused(saved, tmp_path, capsys):
    assert "no file" in refused(capsys, "report", tmp_path / "none.nc")
    blocks = saved / "inverse_blocks.nc"
    assert "no table of layers" in refused(capsys, "report", blocks)
    (tmp_path / "bad.nc").write_text("not netCDF")
    assert "bad.nc" in refused(capsys, "report", tmp_path / "bad.nc")
    told = refused(capsys, "report", saved, "--steps", "5", "--seed", "1")
    assert "--steps, --seed would need a new computation" in told


# --- one's own model --------------------------------------------------------------------

QUICK = ("--approximators", "exact,kfac", "--layers", "3", "--quiet")


@pytest.mark.parametrize("home", ["my_own", "my_own.py"])
def test_ones_own_model_is_analysed_as_it_is(here, home, capsys):
    arguments = ["report", "--model", f"{home}:model", "--data", f"{home}:data", *QUICK]
    assert cli.main([*arguments, "--out", "out"]) == 0
    ds = fl.open(here / "out" / "results.nc")
    assert ds.layer.values.tolist() == ["0", "1", "3"]
    assert ds.step.values.tolist() == [0]
    assert ds.attrs["problem"] == "model"
    assert ds.attrs["model"] == "Sequential, 29 parameters"
    page = capsys.readouterr().out.strip()
    assert "not available" in words(here / page)


def test_ones_own_model_can_be_trained_on_data_of_a_file(here):
    x = np.random.default_rng(0).uniform(size=(20, 4))
    np.savez(here / "data.npz", x=x, y=(x.sum(1) > 2).astype(np.int32), x_test=x, y_test=x)
    arguments = ["--model", "my_own:model", "--data", "data.npz", "--steps", "3"]
    assert cli.main(["report", *arguments, *QUICK, "--out", "out"]) == 2
    np.savez(here / "data.npz", x=x, y=(x.sum(1) > 2).astype(np.int32))
    assert cli.main(["report", *arguments, *QUICK, "--out", "out"]) == 0
    ds = fl.open(here / "out" / "results.nc")
    assert ds.step.values.tolist() == [0, 1, 2, 3]
    assert "test_loss" not in ds


def test_a_report_from_python_equals_a_comparison_by_hand(here):
    made = own.load(ReportConfig(model="my_own:model", data="my_own:data"))
    page = fl.report.of_model(
        made.model, made.train, made.likelihood, here / "out", approximators=["kfac"]
    )
    found = fl.open(page.parent / "results.nc")
    with fl.frozen(made.model):
        stats = fl.collect(made.model, made.train, made.likelihood)
        expected = fl.compare(stats, ["kfac"], metrics=["frobenius_error"])
    np.testing.assert_array_equal(found.frobenius_error, expected.frobenius_error)
    assert made.model.training


def test_a_sweep_of_ones_own_model_holds_every_damping(here, capsys, monkeypatch):
    one = "direction_sweep", "Direction against damping", figures._steps
    monkeypatch.setattr(figures, "RECIPES", (one,))
    arguments = ["--model", "my_own:model", "--data", "my_own:data", "--alpha", "0.1,1"]
    methods = ["--approximators", "kfac,diagonal", "--quiet"]
    assert cli.main(["sweep", *arguments, *methods, "--out", "out"]) == 0
    ds = fl.open(here / "out" / "results.nc")
    assert ds.damping.values.tolist() == [0.1, 1.0]
    made = own.load(ReportConfig(model="my_own:model", data="my_own:data"))
    with fl.frozen(made.model):
        stats = fl.collect(made.model, made.train, made.likelihood)
        gradient = fl.mean_gradient(made.model, made.train, made.likelihood)
    expected = fl.compare(
        stats,
        ["kfac", "diagonal"],
        damping=fl.RelativeDamping([0.1, 1.0]),
        gradient=gradient,
    )
    for name in ("frobenius_error", "inverse_error", "direction_cosine"):
        np.testing.assert_allclose(ds[name], expected[name], rtol=1e-7)
    page = here / capsys.readouterr().out.strip()
    assert "Direction against damping" in words(page)


@pytest.mark.parametrize(
    "command", [pytest.param("report", marks=pytest.mark.slow), "sweep"]
)
def test_the_command_on_a_page_makes_it_again(here, command, capsys):
    mine = ["--model=my_own.py:model", "--data", "my_own:data", "--alpha", "0.1", "--quiet"]
    mine += ["--approximators", "kfac", "--out", "odd name", "--overwrite"]
    assert cli.main([command, *mine]) == 0
    page = here / capsys.readouterr().out.strip()
    told = re.findall(r"<pre><code>(.*?)</code></pre>", page.read_text("utf-8"), re.S)
    packages, place, line = map(html.unescape, told[-3:])
    assert packages.startswith("pip install fisherlab==")
    assert "+" not in packages
    assert place == "# in the folder where my_own.py:model and my_own:data can be found"
    program, *words_again = shlex.split(line)
    assert program == "fisherlab"
    assert cli.main(words_again) == 0
    again = here / capsys.readouterr().out.strip()
    assert again.parent != page.parent
    first, second = (fl.open(p.parent / "results.nc") for p in (page, again))
    xr.testing.assert_equal(first.frobenius_error, second.frobenius_error)


DOCS = Path(__file__).parent.parent / "docs" / "likelihoods.md"


def test_a_likelihood_of_ones_own_is_taken_from_its_file(here, capsys):
    """Student's t of the docs, whose Fisher is that of its samples and of its root."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    (here / "heavy.py").write_text(code)
    student = own.likelihood("heavy.py:StudentT")
    f = torch.zeros(4000, 1).double()
    uniforms = ((torch.arange(4000) + 0.5) / 4000).view(-1, 1).double()
    drawn = student.gradient(f, student.sample(f, uniforms)).square().mean()
    assert float(drawn) == pytest.approx(5 / 7, rel=1e-3)
    root = student.root(f[:1], None, slice(None))
    assert float(root.square().sum()) == pytest.approx(5 / 7)
    y = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).double()
    output = torch.zeros(9, 2, dtype=torch.float64, requires_grad=True)
    student.loss(output, y).sum().backward()
    np.testing.assert_allclose(output.grad, student.gradient(output.detach(), y))
    (here / "net.py").write_text(
        "import torch\nimport fisherlab as fl\nfrom heavy import StudentT\n"
        "def model():\n    return torch.nn.Linear(3, 2).double()\n"
        "def problem():\n    x = torch.rand(20, 3).double()\n"
        "    return fl.problems.Problem('mine', model(), StudentT(), (x, x[:, :2]), "
        "(x, x[:, :2]))\n"
    )
    x = np.random.default_rng(0).normal(size=(20, 3))
    np.savez(here / "data.npz", x=x, y=x[:, :2])
    mine = ["--model", "net.py:model", "--data", "data.npz"]
    mine += ["--likelihood", "heavy.py:StudentT", "--approximators", "kfac,diagonal"]
    assert cli.main(["sweep", *mine, "--out", "out", "--alpha", "0.1,1"]) == 0
    assert "`kfac` " in capsys.readouterr().out
    found = fl.open(here / "out" / "results.nc")
    assert found.attrs["likelihood"] == "StudentT(freedom=4.0)"
    assert found.frobenius_error.notnull().all()
    assert cli.main(["estimate", "--problem", "net.py:problem"]) == 0
    steps = ["--steps", "2", "--optimizer", "sgd-momentum", "--out", "run", "--quiet"]
    assert cli.main(["follow", "--problem", "net.py:problem", *steps]) == 0
    config = ReportConfig(problem="net.py:problem", steps=1)
    problem = own.named(config)
    told = analysis.attributes_of(problem, config, fitted(problem, config))
    assert (told["problem"], told["model"]) == ("mine", "Linear, 8 parameters")


@pytest.mark.parametrize(
    "command", ["estimate", "tune", pytest.param("follow", marks=pytest.mark.slow)]
)
def test_every_command_that_computes_takes_a_model_of_ones_own(here, command, capsys):
    mine = ["--model", "my_own.py:model", "--data", "my_own.py:data"]
    mine += ["--likelihood", "categorical"]
    train = ["--steps", "2", "--out", "run", "--quiet"]
    more = {
        "estimate": ["--approximators", "diagonal"],
        "follow": [*train, "--approximators", "diagonal"],
        "tune": [*train, "--optimizers", "adam", "--lr", "0.1"],
    }
    assert cli.main([command, *mine, *more[command]]) == 0
    out = capsys.readouterr().out
    if command == "estimate":
        assert "N=30" in out
        assert re.search(r"diagonal\s+3×5", out)
    else:
        kept = here / "run"
        losses = fl.open(kept / "results.nc" if command == "tune" else kept).train_loss
        assert losses.notnull().all()
    told = refused(capsys, command, "--data", "my_own.py:data", *more[command])
    assert "--data belongs to --model" in told


def test_values_are_taken_as_they_are_and_loaders_joined(here):
    made = own.load(ReportConfig(model="my_own.py:model", data="my_own.py:data"))
    for data in ("pair", "loader"):
        mine = ReportConfig(model="my_own.py:net", data=f"my_own.py:{data}")
        problem = own.load(mine)
        for found, expected in zip(problem.train, made.train, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(problem.model.state_dict(), made.model.state_dict())


def test_what_is_no_likelihood_is_refused_by_what_it_lacks(here, capsys):
    mine = ["--model", "my_own:model", "--data", "my_own:data"]
    told = refused(capsys, "report", *mine, "--likelihood", "my_own:model")
    assert "--likelihood my_own:model returns a Sequential, which lacks check, loss" in told
    assert "--likelihood must be categorical" in refused(
        capsys, "report", *mine, "--likelihood", "poison"
    )
    told = refused(capsys, "estimate", "--problem", "my_own:model")
    assert "must return a fisherlab.problems.Problem, but returns a Sequential" in told


@pytest.mark.parametrize("command", ["report", "sweep"])
def test_dampings_of_several_kinds_are_named_on_the_page(here, command, capsys):
    own_model = ["--model", "my_own:model", "--data", "my_own:data", "--quiet"]
    kinds = ["--damping", "0.3", "--alpha", "2", "--factored", "0.2"]
    methods = ["--approximators", "exact,kfac", "--out", "out"]
    assert cli.main([command, *own_model, *kinds, *methods]) == 0
    ds = fl.open(here / "out" / "results.nc")
    assert ds.damping.values.tolist() == ["0.3", "relative 2", "factored 0.2"]
    cell = {"layer": "3", "approximator": "kfac"}
    assert ds.direction_cosine.sel(cell).notnull().all()
    text = words(here / capsys.readouterr().out.strip())
    for told in ("Damping λ 0.3", "Damping α 2 (relative", "Factored damping λ 0.2 (on"):
        assert told in text
    assert "at α = 2 (λ = " in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "my_own"), "module:function"),
        (("--model", "my_own:nothing"), "not found"),
        (("--model", "nowhere:model"), "not found"),
        (("--model", "nowhere.py:model"), "there is no file"),
        (("--model", "my_own:broken"), "RuntimeError: two lines"),
        (("--model", "my_own:data"), "must return a torch.nn.Module"),
        (("--model", "my_own:model"), "needs --data"),
        (("--data", "my_own:data"), "--data belongs to --model"),
        (("--model", "my_own:model", "--data", "none.npz"), "no file none.npz"),
        (("--model", "my_own:model", "--data", "my_own:model"), "must give (x, y)"),
        (("--model", "my_own:net", "--data", "my_own:number"), "must give (x, y)"),
        (("--model", "my_own:net", "--data", "my_own:lonely"), "must be pairs (x, y)"),
        (("--model", "my_own:net", "--data", "my_own:several"), "with one tensor x"),
        (("--model", "my_own:net", "--data", "my_own:named"), "holds a dict in the place"),
        (("--model", "my_own:net", "--data", "my_own:unlabelled"), "holds a NoneType in"),
        (("--model", "my_own:model", "--data", "bad.npz"), "hold x and y"),
        (("--model", "my_own:model", "--data", "reals.npz"), "classes as integers"),
        (("--model", "my_own:model", "--data", "uneven.npz"), "as many x as y"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(here, capsys, arguments, told):
    np.savez("bad.npz", a=np.zeros(3))
    np.savez("reals.npz", x=np.zeros((3, 4)), y=np.zeros(3))
    np.savez("uneven.npz", x=np.zeros((3, 4)), y=np.zeros(2, dtype=int))
    assert told in refused(capsys, "report", *arguments, "--out", "out")
    assert not (here / "out").exists()


# --- two runs ---------------------------------------------------------------------------


def test_two_runs_are_set_side_by_side(tmp_path, capsys, monkeypatch):
    one, two = comparison(layers=SMALL), comparison(layers=SMALL, seed=3)
    two["frobenius_error"].loc[{"approximator": "kfac"}] = 0.01
    two.attrs["examples"] = 50
    paths = [fl.save(ds, tmp_path / f"{n}.nc") for n, ds in (("one", one), ("two", two))]
    assert cli.main(["compare", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    page = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    pair = fl.open(tmp_path / "out" / "runs.nc")
    for run, ds in (("one", one), ("two", two)):
        expected = ds["frobenius_error"].isel(step=-1)
        np.testing.assert_array_equal(pair["frobenius_error"].sel(run=run), expected)
    monkeypatch.setattr("fisherlab.report.two_runs.compare_runs", lambda *_, **__: page)
    assert cli.main(["compare", *map(str, paths), "--json"]) == 0
    told, where = capsys.readouterr()
    assert where == f"{page}\n"
    for row in json.loads(told):
        cell = {name: row[name] for name in ("run", "layer", "approximator")}
        assert row["frobenius_error"] == pair["frobenius_error"].sel(cell).item()
    text = words(page)
    assert "examples 1797 50" in text
    assert (
        "In two : kfac is the closest to the exact block by relative error: 0.01," in text
    )


def test_the_closer_run_is_the_one_with_the_smaller_error(tmp_path):
    one, two = comparison(layers=SMALL), comparison(layers=SMALL, seed=3)
    two["frobenius_error"][:] = one["frobenius_error"] * 0.9
    paths = [fl.save(ds, tmp_path / f"{n}.nc") for n, ds in (("one", one), ("two", two))]
    text = words(fl.report.compare_runs(*paths, tmp_path / "out"))
    assert "two is closer to its exact blocks in 12 of 12 cells" in text
    same = words(fl.report.compare_runs(paths[0], paths[0], tmp_path / "same"))
    assert "B is closer to its exact blocks in 0 of 12 cells" in same
    assert "12 are equal" in same
    assert "Nothing that the two runs recorded differs" in same


def test_layers_named_by_numbers_show_their_kind_in_two_runs(tmp_path):
    runs = {}
    for name, kinds in (("one", ["Linear 4→3", "Linear 3→2"]), ("two", ["Linear 4→3"] * 2)):
        ds = comparison(layers={"0": (3, 5), "2": (2, 4)})
        runs[name] = fl.save(
            ds.assign_coords(kind=("layer", kinds)), tmp_path / f"{name}.nc"
        )
    page = fl.report.compare_runs(*runs.values(), tmp_path / "out").read_text()
    assert ">0 · Linear 4→3</th>" in page
    assert ">2</th>" in page  # which differs
    assert fl.open(tmp_path / "out" / "runs.nc").kind.values.tolist() == ["Linear 4→3", ""]


def test_what_is_left_out_is_a_list_with_the_remedy_said_once(tmp_path):
    told = ["variances; ask with --time", "losses; ask with --time", "kfac in 1 layer"]
    ds = comparison(layers=SMALL).assign_attrs(left_out="\n".join(told))
    text = words(fl.report.write(ds, tmp_path / "out"))
    assert "Left out for size ask with --time: variances losses ask with" in text
    assert "ask with --budget and --time: kfac in 1 layer" in text


def test_what_only_one_run_holds_is_named_not_compared(tmp_path):
    one = comparison(layers=SMALL)
    two = comparison(layers={"fc": (3, 4), "<script>": (2, 2)}, approximators=("kfac",))
    paths = [fl.save(ds, tmp_path / f"{n}.nc") for n, ds in (("one", one), ("two", two))]
    page = fl.report.compare_runs(*paths, tmp_path / "out")
    assert "layers only in two : &lt;script&gt;" in words(page)
    assert page.read_text().count("<script>") == 1
    assert fl.open(tmp_path / "out" / "runs.nc").layer.values.tolist() == ["fc"]


def test_errors_whose_intervals_meet_are_within_noise(tmp_path):
    cells = ("layer", "approximator")
    coords = {"layer": ["fc"], "approximator": ["kfac"]}
    paths = []
    for name, error in (("one", 0.40), ("two", 0.38)):
        values = {"frobenius_error": error, "frobenius_error_low": error - 0.03}
        values["frobenius_error_high"] = error + 0.03
        variables = {key: (cells, [[value]]) for key, value in values.items()}
        paths.append(fl.save(xr.Dataset(variables, coords), tmp_path / f"{name}.nc"))
    text = words(fl.report.compare_runs(*paths, tmp_path / "out"))
    assert "within noise" in text
    assert "two is closer to its exact blocks in 0 of 1 cells" in text


def test_dampings_are_compared_where_both_have_them():
    one = comparison(layers=SMALL, dampings=(1e-3, 1e-2, 1e-1))
    two = comparison(layers=SMALL, dampings=(1e-1, 1.0), steps=None)
    pair = together([Run("a", "", one, {}), Run("b", "", two, {})])
    assert pair.attrs["damping"] == 0.1
    expected = two["inverse_error"].sel(damping=0.1).transpose("layer", "approximator")
    np.testing.assert_array_equal(pair["inverse_error"].sel(run="b"), expected)


def test_without_a_damping_in_common_damped_metrics_are_not_compared(tmp_path):
    runs = [
        Run(name, "", comparison(layers=SMALL, dampings=(alpha,)), {})
        for name, alpha in (("a", 0.1), ("b", 0.2))
    ]
    assert "frobenius_error" in together(runs)
    assert not {"inverse_error", "direction_cosine"} & set(together(runs).data_vars)
    paths = [fl.save(run.ds, tmp_path / f"{run.label}.nc") for run in runs]
    told = words(fl.report.compare_runs(*paths, tmp_path / "out"))
    assert "what depends on the damping, of which the two share none" in told


def test_runs_without_anything_in_common_are_refused(tmp_path, capsys):
    paths = [
        fl.save(comparison(layers={name: (2, 3)}), tmp_path / f"{name}.nc")
        for name in ("fc", "conv")
    ]
    told = refused(capsys, "compare", *paths, "--out", tmp_path / "out")
    assert "have no layer in common: fc and conv" in told
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")

    def forbidden(*_):
        pytest.fail("the model was called")

    model = torch.nn.Linear(3, 2)
    model.register_forward_hook(forbidden)
    data = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="overwrite"):
        fl.report.of_model(model, data, fl.Categorical(), tmp_path)


def test_runs_with_different_fishers_are_no_contest(tmp_path):
    paths = []
    for fisher in (fl.Exact(), fl.Empirical()):
        torch.manual_seed(0)
        data = torch.rand(20, 3).double(), torch.arange(20) % 2
        model = torch.nn.Linear(3, 2).double()
        stats = fl.collect(model, data, fl.Categorical(), fisher)
        paths.append(tmp_path / f"{len(paths)}.nc")
        fl.save(fl.compare(stats, ["kfac", "diagonal"]), paths[-1])
    page = fl.report.compare_runs(*paths, tmp_path / "out").read_text()
    assert "different exact blocks" in page
    same = fl.report.compare_runs(paths[0], paths[0], tmp_path / "same").read_text()
    assert "different exact blocks" not in same
