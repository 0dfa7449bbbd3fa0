"""Laws of following a training: nothing is disturbed, and stopping changes nothing."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import fisherlab as fl
from fisherlab.durable import write_durably
from fisherlab.errors import DataError, NumericalError, StoreError
from fisherlab.training import trajectory
from fisherlab.training.schedules import Order, moments
from tests.training_runs import adam, all_probes, light_probes, run, small, timeless


def weights(problem):
    return torch.cat([p.detach().flatten() for p in problem.model.parameters()])


def same(first, second):
    (a, ours), (b, theirs) = first, second
    xr.testing.assert_identical(timeless(a), timeless(b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Stop:
    """A probe that presses Ctrl-C at a step."""

    def __init__(self, step):
        self.step = step

    def __repr__(self):
        return "Stop"

    def __call__(self, moment):
        if moment.step == self.step:
            signal.raise_signal(signal.SIGINT)
        return xr.Dataset()


def test_measuring_does_not_disturb_the_training():
    _, measured = run(every=2, probes=all_probes(), steps=4)
    _, once = run(every=4, probes=[], steps=4)
    assert all(torch.equal(measured[name], once[name]) for name in once)


def test_one_full_batch_step_is_gradient_descent_by_hand():
    problem, other = small(), small()
    x, y = problem.train
    loss = torch.nn.functional.cross_entropy(other.model(x), y)
    grads = torch.autograd.grad(loss, list(other.model.parameters()))
    expected = weights(other) - 0.5 * torch.cat([g.flatten() for g in grads])
    sgd = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    fl.follow(problem, sgd, steps=1, batch_size=40)
    torch.testing.assert_close(weights(problem), expected, rtol=1e-12, atol=1e-14)


def test_the_path_is_that_of_the_plain_loop():
    followed, looped = small(), small()
    fl.follow(followed, adam, steps=13, batch_size=7, seed=3)
    list(trajectory(looped, adam(looped), 13, (13,), batch_size=7, seed=3))
    assert torch.equal(weights(followed), weights(looped))


@pytest.mark.parametrize("stop", [0, 1, 6, 11])
def test_ctrl_c_saves_and_going_on_is_bit_for_bit_the_same(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop} of 12"):
        run(tmp_path, probes=[*light_probes(), Stop(stop)], every=1)
    stopped = fl.open(tmp_path)
    assert stopped.step.values.tolist() == list(range(stop + 1))
    went_on = run(tmp_path, probes=[*light_probes(), Stop(-1)], every=1)
    same(went_on, run(probes=[*light_probes(), Stop(-1)], every=1))
    xr.testing.assert_identical(timeless(fl.open(tmp_path)), timeless(went_on[0]))


def test_averages_and_old_factors_go_on_bit_for_bit(tmp_path):
    run(tmp_path, probes=all_probes(), steps=2)
    went_on = run(tmp_path, probes=all_probes(), steps=5)
    same(went_on, run(probes=all_probes(), every=[0, 2, 3, 5], steps=5))


def test_a_callback_may_stop_the_training(tmp_path):
    def stop(results):
        if results.step[-1] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="after step 6"):
        run(tmp_path, callback=stop)
    same(run(tmp_path), run())


def test_a_second_ctrl_c_stops_at_once_and_the_handler_is_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def twice(moment):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return xr.Dataset()

    with pytest.raises(KeyboardInterrupt) as stop:
        run(tmp_path, probes=[twice])
    assert not stop.value.args
    assert signal.getsignal(signal.SIGINT) is before


@functools.cache
def whole_cheap():
    return run(probes=[fl.probes.Losses()], steps=4)


class Crash(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("number", range(0, 8))
@pytest.mark.parametrize("before", [True, False])
def test_a_crash_at_any_rename_changes_nothing(tmp_path, monkeypatch, number, before):
    """The slow test below kills real processes; this one raises at the same places."""
    real, calls = os.replace, iter(range(1000))

    def crash(source, target):
        mine = next(calls) == number
        if mine and before:
            raise Crash
        real(source, target)
        if mine:
            raise Crash

    cheap = {"probes": [fl.probes.Losses()], "checkpoint_seconds": 0.0, "steps": 4}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(Crash):
            run(tmp_path, **cheap)
    same(run(tmp_path, **cheap), whole_cheap())
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.slow
def test_twenty_killed_processes_end_with_the_same_numbers(tmp_path):
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_runs", str(tmp_path)],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, died = done.stdout.splitlines()
    assert len(lines) == 32
    assert all(line.endswith("same") for line in lines), done.stdout
    assert int(died.split()[1]) >= 10, done.stdout


def test_live_objects_may_be_used_again_after_an_error(tmp_path):
    """The weights of step 0 are in the store, so half-trained ones do no harm."""
    problem = small(dropout=0.3)
    live = adam(problem)

    def fail(moment):
        if moment.step == 3 and not fixed:
            raise RuntimeError("a bug in a probe")
        return xr.Dataset()

    fixed = False
    probes = [*light_probes(), fail]
    options = {"problem": problem, "optimizer": live, "probes": probes}
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path, **options)
    fixed = True
    same(run(tmp_path, **options), run(probes=probes))


def test_a_finished_run_can_be_gone_on_with(tmp_path):
    run(tmp_path, steps=6)
    same(run(tmp_path, steps=12), run(steps=12))
    record = json.loads((tmp_path / "run.json").read_text())
    assert [s["from_step"] for s in record["sessions"]] == [0, 6]
    assert record["steps"] == 12


def test_a_time_in_steps_ends_a_run_which_more_time_goes_on_with(tmp_path):
    options = {"steps": 10**6, "every": 5, "probes": [fl.probes.Losses(50)]}
    problem = fl.problems.load("digits")
    first = fl.follow(problem, seconds=0.05, store=tmp_path / "run", **options)
    assert 0.05 <= float(first.seconds[-1]) < 10
    assert int(first.step[-1]) < 10**6
    again = fl.problems.load("digits")
    spent = float(first.seconds[-1])
    more = fl.follow(again, seconds=spent + 0.05, store=tmp_path / "run", **options)
    assert int(more.step[-1]) > int(first.step[-1])
    xr.testing.assert_equal(more.sel(step=first.step).load(), first)
    third = fl.problems.load("digits")
    steps = int(more.step[-1])
    whole = fl.follow(third, **(options | {"steps": steps, "every": [0, steps]}))
    assert float(whole.train_loss[-1]) == float(more.train_loss[-1])


def test_steps_that_are_not_asked_for_are_not_measured():
    ds = fl.follow(fl.problems.load("digits"), steps=3, every=[0, 2])
    assert ds.step.values.tolist() == [0, 2]


def test_deterministic_algorithms_are_asked_for_during_the_run_alone():
    seen = []

    def look(moment):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return xr.Dataset()

    for wanted in (True, False):
        problem = fl.problems.load("digits")
        fl.follow(problem, steps=1, every=1, probes=[look], deterministic=wanted)
    assert seen == [True, True, False, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_time_is_refused():
    with pytest.raises(ValueError, match="positive time"):
        fl.follow(fl.problems.load("digits"), seconds=0.0)


def test_a_finished_run_is_only_read(tmp_path):
    first = run(tmp_path)
    stamp = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    again = run(tmp_path)
    xr.testing.assert_identical(first[0], again[0])
    same(first, again)
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_results_of_few_checkpoints_are_few_files(tmp_path):
    run(tmp_path, probes=[fl.probes.Losses()], every=1, steps=30)
    assert len(list(tmp_path.glob("results-*.nc"))) == 2  # step 0, and the rest
    assert fl.open(tmp_path).sizes["step"] == 31


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 9}, "batch_size is 8 there and 9 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"problem": small(seed=5, dropout=0.3)}, "train is .* there and .* here"),
        (
            {"optimizer": lambda p: torch.optim.SGD(p.model.parameters(), lr=0.1)},
            "optimizer name is Adam there and SGD here; optimizer lr is .0.02.",
        ),
        ({"probes": [fl.probes.Losses()]}, "probes is"),
        ({"steps": 3}, "at step 6 already"),
        ({"every": 2}, r"has not measured at \[2, 4\]"),
        ({"resume": False}, "resume=True, or name another folder"),
    ],
)
def test_another_run_is_refused_by_the_name_of_what_differs(tmp_path, change, named):
    run(tmp_path, steps=6)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=named):
        run(tmp_path, **{"steps": 12} | change)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(DataError, match=r"other files \(thesis.tex\)"):
        run(tmp_path)


def test_an_unwritable_store_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/run cannot be written: Not a directory"):
        run(tmp_path / "file" / "run")


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def half(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_durably(file, half)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, real_sync, real_move = [], os.fsync, os.replace

    def sync(handle):
        done.append(os.fstat(handle).st_ino)
        real_sync(handle)

    def move(source, target):
        done.append("renamed")
        real_move(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    file = write_durably(tmp_path / "a.txt", lambda path: path.write_text("done"))
    assert done == [file.stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real, calls = os.fsync, iter(range(1000))

    def full(handle):
        if next(calls) > 8:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left on device. The last"):
            run(tmp_path, checkpoint_seconds=0.0)
    same(run(tmp_path), run())


@pytest.mark.slow
def test_a_real_limit_on_the_size_of_files_is_a_clear_error(tmp_path):
    """The kernel refuses the write, as it does on a full disk."""
    code = (
        "import resource, signal, sys, torch, xarray\n"
        "from tests.training_runs import run\n"
        "import fisherlab as fl\n"
        "class Large:\n"
        "    def observe(self, memory, moment): return torch.ones(9999)\n"
        "    def measure(self, memory, moment): return xarray.Dataset()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try:\n"
        "    run(sys.argv[1], probes=[Large()])\n"
        "except fl.StoreError as error:\n"
        "    print(error)\n"
    )
    found = {}
    for limit in (500, 3_000, 30_000):  # record, results, checkpoint
        folder = tmp_path / str(limit)
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(limit)],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "cannot be written" in done.stdout
        found[limit] = {path.name for path in folder.glob("*")}
    results = "results-000000000-000000000.nc"
    assert found == {
        500: set(),
        3_000: set(),
        30_000: {"lock", "run.json", results},
    }


def test_two_processes_do_not_share_a_store(tmp_path):
    def again(moment):
        run(tmp_path)
        return xr.Dataset()

    with pytest.raises(StoreError, match="Another process works in the store"):
        run(tmp_path, probes=[again])


def test_a_damaged_checkpoint_is_named_and_code_in_it_is_not_run(tmp_path):
    import pickle

    run(tmp_path, steps=3)
    file = tmp_path / "checkpoint.pt"
    whole = file.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", pickle.dumps(_Evil(), protocol=2)):
        file.write_bytes(bad)
        with pytest.raises(DataError, match="not a readable checkpoint"):
            run(tmp_path)
    assert "FISHERLAB_EVIL" not in os.environ


class _Evil:
    def __reduce__(self):
        return os.putenv, ("FISHERLAB_EVIL", "1")


def test_a_diverging_run_leaves_its_results(tmp_path):
    def explode(moment):
        if moment.step == 6:
            with torch.no_grad():
                next(moment.model.parameters()).fill_(float("nan"))
        return xr.Dataset()

    with pytest.raises(NumericalError, match="step 7"):
        run(tmp_path, probes=[explode])
    assert fl.open(tmp_path).step.values.tolist() == [0, 3, 6]


def test_nothing_global_is_touched():
    problem = small(dropout=0.3)
    problem.model[1].eval()
    modes = [m.training for m in problem.model.modules()]
    before = torch.get_rng_state()
    run(problem=problem, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in problem.model.modules()] == modes


def test_the_seed_decides_order_and_dropout():
    one, same_one, other = (run(seed=s, steps=4, probes=[])[1] for s in (1, 1, 2))
    assert all(torch.equal(one[k], same_one[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_dropout_is_drawn_anew_in_every_step():
    def still(problem):
        return torch.optim.SGD(problem.model.parameters(), lr=0.0)

    problem = small(dropout=0.3)
    x, y = (t[:1].expand(40, *t.shape[1:]) for t in problem.train)
    options = {"every": 1, "steps": 4, "probes": [], "optimizer": still}
    ds, _ = run(problem=replace(problem, train=(x, y)), **options)
    assert len(np.unique(ds.batch_loss[1:])) == 4


def test_batch_loss_is_the_mean_of_the_steps_between():
    ds, _ = run(every=4, probes=[], problem=small(), steps=8)
    each, _ = run(every=1, probes=[], problem=small(), steps=8)
    expected = each.batch_loss[1:].values.reshape(2, 4).mean(1)
    np.testing.assert_allclose(ds.batch_loss[1:], expected, rtol=1e-12)
    assert np.isnan(ds.batch_loss[0])


def test_probes_that_give_the_same_variable_are_refused():
    pair = [fl.probes.Losses(), fl.probes.Losses(examples=5)]
    with pytest.raises(ValueError, match=r"Losses\(examples=5\) both give 'train_loss'"):
        run(probes=pair)


def test_a_probe_must_return_a_dataset():
    with pytest.raises(TypeError, match="returned a float"):
        run(probes=[lambda moment: 1.0])


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (5, (0, 5, 10, 12)),
        ([7, 1, 7], (1, 7)),
        (fl.LinearSteps(4), (0, 4, 8, 12)),
        (fl.LogarithmicSteps(3), (0, 3, 12)),
    ],
)
def test_moments(every, expected):
    assert moments(every, 12) == expected


@pytest.mark.parametrize(
    ("every", "message"), [(0, "positive"), ([13], "outside"), (lambda n: [-1], "outside")]
)
def test_moments_outside_are_refused(every, message):
    with pytest.raises(ValueError, match=message):
        moments(every, 12)


@pytest.mark.parametrize(("count", "size"), [(10, 3), (7, 7), (5, 8), (9, 1)])
def test_an_epoch_has_no_example_twice_and_any_batch_can_be_asked_for(count, size):
    order = Order(count, size, seed=4)
    per_epoch = max(count // size, 1)
    asked = [order.indices(k) for k in range(3 * per_epoch)]
    for epoch in range(3):
        seen = torch.cat(asked[epoch * per_epoch : (epoch + 1) * per_epoch]).tolist()
        assert len(set(seen)) == len(seen) == per_epoch * min(size, count)
    for k in (2 * per_epoch, 0, 3 * per_epoch - 1, per_epoch):
        assert torch.equal(Order(count, size, seed=4).indices(k), asked[k])
        assert torch.equal(order.indices(k), asked[k])


def test_the_same_batch_is_looked_at_and_trained_with():
    seen = []

    def note(moment):
        seen.append(moment.batch[0])
        return xr.Dataset()

    problem = small()
    taken = []
    problem.model.register_forward_pre_hook(
        lambda module, args: taken.append(args[0]) if module.training else None
    )
    run(problem=problem, probes=[note], every=1, steps=6)
    assert all(torch.equal(a, b) for a, b in zip(seen, taken, strict=False))
    assert len(taken) == 6


def test_problems_are_compared_by_their_data_not_by_their_name(tmp_path):
    problem = small()
    fl.follow(problem, adam, steps=1, store=tmp_path)
    x, y = small().train
    moved = replace(small(), train=(x + 1e-9, y))
    with pytest.raises(ValueError, match="train is"):
        fl.follow(moved, adam, steps=1, store=tmp_path)


@pytest.mark.parametrize(
    "name",
    ["kfac", "ekfac", "kfac-corrected-koroko", "mbf", "kfac-full", "k-bfgs", "singd"],
)
def test_every_kind_of_optimiser_goes_on_bit_for_bit(tmp_path, name):
    """Averages, old inverses, momentum, adapted damping and counters are all kept."""

    def make(problem):
        own = {} if name == "kfac-full" else {"lr": 1e-3}
        return fl.optimizer(name, problem, **own)

    cheap = {"probes": [fl.probes.Losses()], "optimizer": make, "scheduler": None}
    run(tmp_path, problem=small(), steps=4, **cheap)
    went_on = run(tmp_path, problem=small(), steps=7, every=[0, 3, 4, 6, 7], **cheap)
    same(went_on, run(problem=small(), steps=7, every=[0, 3, 4, 6, 7], **cheap))


def test_batches_may_grow(tmp_path):
    growing = {"batch_size": fl.ExponentialBatches(4, 40, 10), "probes": []}
    looped = small()
    list(trajectory(looped, adam(looped), 12, (), batch_size=growing["batch_size"]))
    run(tmp_path, problem=small(), steps=5, scheduler=None, **growing)
    problem = small()
    run(tmp_path, problem=problem, steps=12, scheduler=None, every=[0, 3, 5, 12], **growing)
    assert torch.equal(weights(problem), weights(looped))


def test_augmented_batches_are_trained_with_and_plain_ones_are_looked_at(tmp_path):
    def noisy(x, generator):
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def augmented():
        return replace(small(), augment=noisy)

    looped, followed = augmented(), augmented()
    list(trajectory(looped, adam(looped), 6, ()))
    plain = []

    def note(moment):
        plain.append(moment.batch[0])
        return xr.Dataset()

    fl.follow(followed, adam, steps=3, probes=[note], store=tmp_path)
    fl.follow(augmented(), adam, steps=3, probes=[note], store=tmp_path)
    fl.follow(followed, adam, steps=6, every=[0, 1, 2, 3, 6], probes=[note], store=tmp_path)
    assert torch.equal(weights(followed), weights(looped))
    x, _ = small().train
    assert all((x == row).all(1).any() for row in plain[0])
