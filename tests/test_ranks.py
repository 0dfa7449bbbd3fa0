"""Several processes give the numbers of one: parts of the data, uneven and empty."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

import fisherlab as fl
from fisherlab.training.sending import of_rank
from tests import rank_jobs
from tests.rank_jobs import saved, spawned
from tests.training_runs import small

CLOSE = 1e-12
# Rounding times the condition of factors that are inverted in each round, or over the gaps
# of singular values that later vectors lie between.
AMPLIFIED = dict.fromkeys(["kl-shampoo", "kpsvd-2", "kpsvd-3", "kpsvd-4"], 1e-9)
AMPLIFIED |= dict.fromkeys(["deflation", "kfac-corrected", "passes"], 1e-9)


def require_equal(found, expected):
    assert list(found) == list(expected)
    for key, matrix in expected.items():
        error = float((found[key] - matrix).norm() / matrix.norm().clamp_min(1e-300))
        assert error < AMPLIFIED.get(key[0], CLOSE), (key, error)


def require_same_approximations(found, alone):
    for name in ("exact", "sampled", "means", "batches"):
        for rank in found:
            require_equal(rank[name], alone[name])
        for other in found[1:]:
            assert all(torch.equal(other[name][k], m) for k, m in found[0][name].items())
    labels = {}
    for rank in found:
        assert labels.keys().isdisjoint(rank["labels"])
        labels |= rank["labels"]
    assert labels == alone["labels"]


def test_two_ranks_compare_as_one(two, alone):
    assert of(two, "comparison")
    for rank in of(two, "comparison"):
        for table, expected in zip(rank, alone["comparison"], strict=True):
            assert table.keys() == expected.keys()
            for name in set(table) - {"seconds"}:
                np.testing.assert_allclose(table[name], expected[name], CLOSE, CLOSE)


TRAINED = [*rank_jobs.OPTIMISERS, "kfac in DDP", "adaptive in DDP"]
TRAINED += ["closure", "closure in DDP", "uneven closure"]


@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_train_as_one(two, alone, name):
    first, second = of(of(two, "trainings"), name)
    expected = alone["trainings"][name]
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(*map(torch.as_tensor, (first[key], second[key]))), key
        close = rank_jobs.rounding() if name.startswith("adaptive") else CLOSE
        np.testing.assert_allclose(first[key], value, rtol=close, atol=close, err_msg=key)


@pytest.mark.parametrize("name", rank_jobs.OPTIMISERS)
def test_the_bytes_of_steps_are_those_foretold(two, name):
    model, lik = rank_jobs.begun(torch.Generator()), fl.Categorical()
    optimiser = rank_jobs.OPTIMISERS[name](model)
    pair = torch.zeros(2, 4).double(), torch.zeros(2).long()
    for rank, found in enumerate(of(two, "trainings")):
        told = of_rank(model, pair, lik, optimiser, [8, 3], rank)
        assert found["sent"][name] == [vars(told.at(step)) for step in range(10)]


class Judging(fl.approximators.OfSums):
    """A method whose sums hang on the numbers, so that nothing tells their bytes."""

    def accumulate(self, state, statistics):
        return state or float(statistics.samples.squares().sum())

    def finish(self, state):
        raise AssertionError(state)


def test_bytes_of_steps_that_hang_on_numbers_are_refused():
    model, lik = rank_jobs.begun(torch.Generator()), fl.Categorical()
    optimiser = fl.NaturalGradient(model, lik, Judging(), lr=0.1, damping=0.1)
    pair = torch.zeros(2, 4).double(), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"step_bytes: .* as many passes"):
        of_rank(model, pair, lik, optimiser, [8, 3], 0)
    wide = torch.zeros(2, 9).double(), pair[1]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # the model's
        of_rank(model, wide, lik, optimiser, [8, 3], 0)


@pytest.mark.parametrize("name", ["sgd-momentum", "kfac"])
def test_two_ranks_follow_as_one_and_the_first_writes(two, alone, name):
    first, second = of(of(two, "followed"), name)
    expected = alone["followed"][name]
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(first[key], second[key])
        np.testing.assert_allclose(first[key], value, 1e-9, 1e-12, err_msg=key)
    files = of(of(two, "followed"), f"files of {name}")
    assert files == [alone["followed"][f"files of {name}"], 0]


SAID = {
    "a bad part": ("ValueError", "x holds NaN or infinity in 11 of 11 examples"),
    "no part": ("ValueError", "none of the 2 ranks was given an example"),
    "read once": ("ValueError", "can be read only once, but sampled labels over several"),
    "other methods": ("RankError", "the ranks stream other methods or blocks"),
    "batch norm": ("RankError", "each of 2 ranks sees a part"),
    "one example": ("RankError", "A batch of 1 examples cannot be shared by 2 ranks"),
    "other seeds": ("RankError", "The settings of rank 1 differ from those of rank 0"),
    "other weights": ("RankError", "The weights of rank 1 differ from those of rank 0"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory, worker_id):
    """Two ranks, started once for all workers of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "two_ranks"
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return saved(2, folder)
        folder.mkdir()
        return spawned(rank_jobs.everything, 2, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return rank_jobs.everything(0, 1, tmp_path_factory.mktemp("alone"))


def of(found, name):
    return [rank[name] for rank in found]


def test_two_ranks_approximate_as_one(two, alone):
    require_same_approximations(of(two, "approximations"), alone["approximations"])


@pytest.mark.parametrize("name", ["3", "0", "table"])
def test_groups_uses_and_large_samples_are_added_up(two, alone, name):
    expected, nothing = alone["by parts"][name]
    assert not any(nothing.values())
    for found, sent in of(of(two, "by parts"), name):
        assert sent["added"] > 0
        assert sent["gathered"] == 0
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, 1e-7, 1e-8, err_msg=str(key))


def require_foretold(found, ranks):
    model, batch, lik, methods, fisher = rank_jobs.one_by_one()
    told = fl.estimate(model, batch, lik, methods, fisher, ranks=ranks).shares
    some = fl.estimate(model, batch, lik, rank_jobs.TOGETHER, fisher, ranks=ranks).shares
    expected = {name: {"added": 0, "gathered": 0} for name in methods}
    for row in told.rows:
        expected[row.approximator]["added"] += row.added
        expected[row.approximator]["gathered"] += row.gathered
    expected["together"] = vars(some.sent)
    assert all(sent == expected for sent in found), (found[0], expected)
    assert all(map(any, (sent.values() for sent in expected.values())))


def test_the_bytes_that_are_sent_are_those_of_the_estimate(two):
    require_foretold(of(two, "sent"), 2)


@pytest.mark.slow
def test_four_ranks_send_the_bytes_of_the_estimate(tmp_path):
    require_foretold(spawned(rank_jobs.sent, 4, tmp_path), 4)


@pytest.mark.slow
def test_a_step_sends_the_bytes_of_the_estimate(tmp_path):
    model, batch, lik, _, fisher = rank_jobs.one_by_one()
    for found in spawned(rank_jobs.steps, 4, tmp_path):
        for name, bytes_ in found.items():
            told = fl.estimate(model, batch, lik, [name], fisher, ranks=4).shares
            assert told.step_bytes == bytes_, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sums", "passes", "samples"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_holds_the_bytes_of_the_estimate(tmp_path, ranks, kind):
    grown = spawned(partial(rank_jobs.peak, kind=kind), ranks, tmp_path)
    told = fl.estimate(*rank_jobs.wide(kind), ranks=ranks).shares
    assert told.bytes == pytest.approx(max(grown), rel=0.2)


@pytest.mark.parametrize("case", SAID)
def test_what_one_rank_cannot_do_all_ranks_refuse_alike(two, case):
    kind, message = SAID[case]
    for rank in of(two, "refusals"):
        assert rank[case][0] == kind
        assert message in rank[case][1]
    if case == "a bad part":
        assert two[0]["refusals"][case][2] == ["This happened on rank 1 of 2."]


def test_unequal_numbers_of_batches_are_noticed(two):
    for kind, message, _ in of(two, "unequal"):
        assert kind == "RankError"
        assert "rank 0 is in NaturalGradient.step (at " in message
        assert "rank 1 in approximate (at " in message
        assert "equal numbers of batches" in message


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs", "leaves"])
def test_a_rank_that_is_lost_is_named_within_the_time_out(tmp_path, how):
    job = partial(rank_jobs.left_alone, how=how)
    running = rank_jobs.started(job, 3, tmp_path, timeout=10)
    try:
        for process in running.processes[:2]:
            process.join(rank_jobs.TIMEOUT / 2)  # one that hangs does for longer
            assert not process.is_alive()
    finally:
        for process in running.processes:
            process.kill()
    kind, message, _, seconds = torch.load(tmp_path / "told_0.pt", weights_only=False)
    assert kind == "RankError"
    assert seconds < (20 if how == "hangs" else 10)  # where the time-out is 10
    assert "rank 2 of 3 died, or hung until the group's time-out" in message


@pytest.mark.slow
def test_four_ranks_one_of_them_empty_give_the_numbers_of_one(tmp_path, alone):
    found = spawned(rank_jobs.approximations, 4, tmp_path)
    require_same_approximations(found, alone["approximations"])


# Of this, replicas alone are equal: it takes a basis of a null space, which rounding
# decides (examples in another order as well).
OF_THEIR_OWN = {"soap"}
ITERATED = {"cg-fac", "kl-shampoo", "muon", "kpsvd-koroko", "deflation-koroko"}
ITERATED |= {"lanczos-koroko", "kfac-corrected-koroko"}
ITERATED |= {"kfac-full", "kfac-full-tridiagonal"}  # λ and γ follow the losses of steps


def require_foretold_steps(name, sent):
    """Compare the bytes of ten steps with those counted, on the rank that sends most."""
    problem, ranks = small(), len(sent)
    size = len(problem.train[0]) // 2
    told = fl.training.step_bytes(problem, name, ranks=ranks, batch_size=size)
    most = max(sent, key=lambda steps: sum(steps[0].values()))
    assert most == [vars(told.at(step)) for step in range(len(most))], name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("group", range(4))
def test_every_named_optimiser_trains_in_ddp_as_one_process(tmp_path, group, ranks):
    expected = rank_jobs.recipes(0, 1, group=group)
    found = spawned(partial(rank_jobs.recipes, group=group), ranks, tmp_path)
    assert len(expected) >= 7
    for name, (values, _) in expected.items():
        require_foretold_steps(name, [rank[name][1] for rank in found])
        for key, value in values.items():
            first, *others = (rank[name][0][key] for rank in found)
            assert all(torch.equal(other, first) for other in others), (name, key)
            error = float((first - value).norm() / value.norm())
            allowed = 1e-9 if name in ITERATED else CLOSE
            assert name in OF_THEIR_OWN or error < allowed, (name, key, error)


@pytest.mark.slow
def test_a_training_goes_on_after_a_rank_was_killed(tmp_path):
    running = rank_jobs.started(rank_jobs.killed, 2, tmp_path, timeout=60)
    for process in running.processes:
        process.join(rank_jobs.TIMEOUT)
        assert not process.is_alive()
    kind, message, _ = torch.load(tmp_path / "told_0.pt", weights_only=False)
    assert kind == "RankError"
    assert "rank 1 of 2 died" in message
    (tmp_path / "meeting").unlink(missing_ok=True)
    both = spawned(rank_jobs.gone_on, 2, tmp_path)
    record = json.loads((tmp_path / "store" / "run.json").read_text())
    assert [session["from_step"] for session in record["sessions"]] == [0, 7]
    for name, value in rank_jobs.gone_on(0, 1, tmp_path / "alone").items():
        np.testing.assert_array_equal(both[0][name], both[1][name])
        np.testing.assert_allclose(both[0][name], value, 1e-9, 1e-12, err_msg=name)


ONE_MODULE = ["-m", "fisherlab"]
TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *ONE_MODULE]


def command(folder, start, words):
    """Run the command line in a folder; return its code and what it said on stderr."""
    place = {"PYTHONPATH": str(Path(fl.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, *start, *words.split()],
        cwd=folder,
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in found.stderr.splitlines() if line.startswith("fisherlab: ")]
    return found.returncode, said


def require_close(first, second, tolerance=1e-8):
    assert set(first) == set(second)
    for name, values in first.items():
        if values.dtype.kind == "f" and "seconds" not in name:
            np.testing.assert_allclose(second[name], values, tolerance, 1e-12, err_msg=name)


@pytest.mark.slow
def test_the_commands_of_the_readme_give_the_numbers_of_one_process(tmp_path):
    words = "--steps 20 --checkpoints 0,20 --examples 100 --approximators kfac --quiet"
    for start, out in ((TWO, "two"), (ONE_MODULE, "one")):
        assert command(tmp_path, start, f"report {words} --out {out}") == (0, [])
    code, told = command(tmp_path, TWO, f"report {words} --out two")
    assert (code, len(told)) == (1, 1)
    assert "exists and is not empty" in told[0]
    require_close(*(fl.open(tmp_path / name / "results.nc") for name in ("one", "two")))


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_a_training(tmp_path):
    words = "follow --optimizer kfac --every 4 --quiet --probes losses"
    sessions = ((TWO, 4), (ONE_MODULE, 8), (TWO, 12))
    for start, steps in sessions:
        assert command(tmp_path, start, f"{words} --steps {steps} --out a") == (0, [])
    assert command(tmp_path, ONE_MODULE, f"{words} --steps 12 --out b") == (0, [])
    require_close(fl.open(tmp_path / "b"), fl.open(tmp_path / "a"))
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert [session["ranks"] for session in record["sessions"]] == [2, 1, 2]
    code, told = command(tmp_path, TWO, "tune")
    assert code == 1
    assert "this command takes one process" in told[0]
