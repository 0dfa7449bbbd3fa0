"""Laws of the mini-block paper's experiments, and of the command that runs figures."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from torch.func import jacrev

import fisherlab as fl
from fisherlab.cli import main
from fisherlab.operators import Partition
from fisherlab.reproduce import catalogue
from fisherlab.reproduce import mini_block_directions as directions
from fisherlab.reproduce import mini_block_fisher as masses
from fisherlab.reproduce.figure import Figure
from fisherlab.reproduce.mini_block_convergence import Regression, draw, theorem
from fisherlab.reproduce.mini_block_directions import Follower
from tests.cases import normal
from tests.oracles import assert_close, damped_inverse


def test_the_mass_inside_blocks_is_that_of_loops():
    matrix = normal(6, 6)
    found = masses.mass_inside(matrix, Partition.by_row((2, 3)))
    inside = [(i, j) for i in range(6) for j in range(6) if i // 3 == j // 3]
    sizes = sum(abs(float(matrix[place])) for place in inside)
    squares = sum(float(matrix[place]) ** 2 for place in inside)
    assert found["absolute"] == pytest.approx(sizes / float(matrix.abs().sum()))
    assert found["squared"] == pytest.approx(squares / float(matrix.square().sum()))
    assert found["entries"] == len(inside) / 36


def test_a_step_of_the_theorem_is_that_of_its_formula():
    problem = Regression.drawn(4, 5, 1.0, seed=3)
    weights = [p.detach().clone() for p in problem.model.parameters()]

    def output(first, second):
        return (torch.tanh(problem.x @ first.T) @ second.T)[:, 0]

    parts = jacrev(output, argnums=(0, 1))(*weights)
    blocks = [*parts[0].unbind(1), parts[1][:, 0]]  # a unit each, and the output
    assert len(blocks) == 6
    least = min(float(torch.linalg.eigvalsh(j @ j.T)[0]) for j in blocks)
    assert_close(problem.smallest(), least, 1e-6)
    rest = output(*weights) - problem.y[:, 0]
    assert_close(problem.residual(), rest, 1e-12)
    moves = [damped_inverse(j.T @ j / 4, 0.1) @ (j.T @ rest / 4) for j in blocks]
    problem.step(0.2, 0.1)
    first, second = problem.model.parameters()
    assert_close(first.detach(), weights[0] - 0.2 * torch.stack(moves[:-1]), 1e-10)
    assert_close(second.detach(), weights[1] - 0.2 * moves[-1], 1e-10)


def test_the_rate_of_the_theorem_holds_for_small_steps_and_breaks_at_one_over_k():
    found = theorem(0, True)
    assert found.residual.isel(step=0).min() == 1
    small = found.sel(rate=[0.1, 0.25, 0.5])
    assert bool(small["holds"].all())
    assert float(small.worst_ratio.max()) < 0.95
    far = found.sel(rate=1.0, setting="n=8, m=24, far targets")
    assert not bool(far["holds"].all())
    bound = found.bound.sel(setting="n=6, m=16", rate=0.5)
    assert_close(bound.values, (1 - 0.5 / 17) ** np.arange(11))
    plt.close(draw(found))


def test_all_directions_are_the_gradient_where_the_damping_is_large():
    problem = fl.problems.load("digits")
    x, y = problem.train
    for damping, least, most in ((1e6, 0.9999, 1.0001), (1e-3, -1.0, 0.99)):
        follower = Follower(problem, damping, seed=0)
        for step in range(2):
            part = slice(40 * step, 40 * step + 40)
            follower.observe((x[part], y[part]), step, 0.9)
        found = np.array(follower.cosines())
        assert found.shape == (7, 4)
        assert (found >= least).all()
        assert (found <= most).all()
    weights = problem.model.fc3.weight.detach().clone()
    change = follower.direction("BDF", "fc3")
    follower.move()
    moved = (weights - problem.model.fc3.weight.detach()) / 0.01
    assert_close(moved, change[:, :-1], 1e-9)


def test_drawings_show_a_panel_for_each_setting():
    dims = {"damping": [0.1, 1.0], "step": [0, 1], "approximator": [*"ab"], "layer": ["c"]}
    values = np.arange(8.0).reshape(2, 2, 2, 1)
    drawing = directions.draw(xr.Dataset({"cosine": xr.DataArray(values, dims)}))
    assert [ax.get_title() for ax in drawing.axes] == ["λ = 0.1", "λ = 1"]
    dims = {"fisher": ["exact"], "layer": ["c"], "matrix": ["inverse", "block"]}
    share = xr.DataArray(np.full((1, 1, 2, 1), 0.5), dims | {"of": ["squared"]})
    drawing = masses.draw_mass(xr.Dataset({"share": share}))
    assert drawing.axes[0].get_title() == "exact Fisher: inverse"
    plt.close("all")


@pytest.mark.slow
def test_the_inverse_has_its_mass_inside_mini_blocks():
    share = masses.digits_mass(0, True).share
    inverse, block = share.sel(matrix="inverse"), share.sel(matrix="block")
    assert (inverse.sel(of="squared") > 0.7).all()
    assert (inverse.sel(of="absolute") > 3 * inverse.sel(of="entries")).all()
    middle = ["fc2", "fc3", "fc4"]
    rest = block.sel(of="squared", layer=middle)
    assert (rest < 0.5 * inverse.sel(of="squared", layer=middle)).all()
    assert_close(inverse.sel(of="entries", layer="fc3").values, [1 / 20] * 2)


def test_kernels_of_one_channel_are_those_entries_of_the_block():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 2), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    ).double()
    stats = fl.collect(model, (normal(4, 3, 3, 3), None), fl.Categorical())["0"]
    part = masses._channel(stats, 2)
    place = torch.arange(2 * 13).view(2, 13)[:, 4:8].flatten()
    whole = fl.ExactBlock()(stats).to_dense()
    assert_close(fl.ExactBlock()(part).to_dense(), whole[place][:, place], 1e-12)
    assert part.weight_shape == (2, 4)


# --- the command ---


def tiny(seed, quick):
    return xr.Dataset({"value": ("k", [float(seed), float(quick)])}, {"k": [0, 1]})


def broken(result):
    raise ArithmeticError("no drawing")


@pytest.fixture
def listed(monkeypatch):
    known = {
        "tiny": Figure("tiny", "Two numbers.", tiny, lambda _: plt.figure()),
        "broken": Figure("broken", "Never drawn.", tiny, broken),
    }
    monkeypatch.setattr(catalogue, "figures", lambda: known)


def test_figures_are_listed_and_unknown_ones_named(listed, capsys):
    assert main(["reproduce"]) == 0
    assert "Two numbers." in capsys.readouterr().out
    assert main(["reproduce", "nothing"]) == 2
    assert "tiny" in capsys.readouterr().err


def test_a_figure_is_written_with_its_data_and_its_numbers(listed, tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["reproduce", "tiny", "--seed", "3", "--quick", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    names = sorted(file.name for file in out.iterdir())
    assert names == ["results.nc", "tiny.csv", "tiny.pdf", "tiny.png"]
    found = fl.open(out / "results.nc")
    assert found["value"].values.tolist() == [3.0, 1.0]
    assert (found.attrs["figure"], found.attrs["seed"], found.attrs["quick"]) == (
        "tiny",
        3,
        1,
    )
    assert main(["reproduce", "tiny", "--out", str(out)]) == 2  # it is not empty


def test_a_figure_that_fails_leaves_nothing_behind(listed, tmp_path):
    with pytest.raises(ArithmeticError):
        main(["reproduce", "broken", "--out", str(tmp_path / "new")])
    assert list(tmp_path.iterdir()) == []


def test_all_figures_of_the_folder_are_found():
    names = catalogue.figures()
    assert {"mbf-theorem-1", "mbf-mass-digits", "mbf-mass-cnn"} <= set(names)
    assert all(name == figure.name for name, figure in names.items())
