"""Laws of statistics on a disk: every answer is that of statistics in memory."""

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fisherlab as fl
from fisherlab.approximators.base import facts
from fisherlab.approximators.online import Observation
from fisherlab.durable import claimed
from fisherlab.errors import DataError
from fisherlab.samples import parted
from fisherlab.statistics import storing, values
from fisherlab.statistics.values import Stored
from tests.cases import normal
from tests.oracles import assert_close


class Tied(nn.Module):
    """An embedding that is the last layer's weight too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, x):
        return torch.tanh(self.table(x)).mean(1) @ self.table.weight.T


def mean_of_tokens():
    return nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(12, 3))


def before(kind, *sizes, **options):
    return nn.Sequential(kind(*sizes, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


KINDS = {
    "outer": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)), (3,)),
    "shared": (partial(before, nn.Conv2d, 2, 2, 2), (2, 3, 3)),
    "grouped": (partial(before, nn.Conv1d, 4, 4, 2, groups=2), (4, 3)),
    "turned": (partial(before, nn.ConvTranspose1d, 2, 2, 2), (2, 3)),
    "matrices": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)),
        (3,),
    ),
    "tokens": (mean_of_tokens, None),
    "summed": (Tied, None),
}
SLOW = pytest.mark.slow
LABELS = {"exact": fl.Exact(), "sampled": fl.MonteCarlo(2, seed=1)}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Let every run of examples be a part of its own."""
    monkeypatch.setattr(storing, "PART_BYTES", 1)


def problem(kind, n):
    made, shape = KINDS[kind]
    x = normal(n, *shape) if shape else torch.arange(4 * n).view(n, 4) ** 2 % 5
    model = made().double()
    model(x)
    return model, (x, torch.arange(n) % 3)


def both(model, data, folder, chunk=2, **settings):
    """Return statistics in memory and on a disk, parts of two examples."""
    own = [fl.Categorical(), settings.pop("fisher", fl.Exact())]
    settings |= {"compress": False}
    held = fl.collect(model, data, *own, **settings)
    return held, fl.collect(
        model, data, *own, **settings, chunk_size=chunk, store=folder, budget="1 GiB"
    )


@pytest.mark.parametrize(
    "kind", ["shared", *(pytest.param(k, marks=SLOW) for k in KINDS if k != "shared")]
)
@given(n=st.integers(2, 5), chunk=st.integers(1, 3), labels=st.sampled_from([*LABELS]))
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_samples_on_a_disk_answer_as_those_in_memory(kind, n, chunk, labels, tmp_path):
    folder = tmp_path / "held"
    shutil.rmtree(folder, ignore_errors=True)
    held, stored = both(*problem(kind, n), folder, chunk, fisher=LABELS[labels])
    assert stored.nbytes == held.nbytes
    assert stored.provenance == held.provenance
    for name, layer in stored.items():
        a, b = held[name], pickle.loads(pickle.dumps(layer))
        assert len(list(b.pieces())) == -(-n // chunk)
        assert (b.count, b.positions, b.dtype) == (a.count, a.positions, a.dtype)
        answers(a.samples, b.samples)
        some = slice(1, None)
        answers(a.samples.some_columns(some), b.samples.some_columns(some))
        single = b.samples.to(torch.float32)
        assert single.squares().dtype == torch.float32
        assert_close(single.squares(), a.samples.squares(), 1e-4, 1e-7)


def answers(a, b):
    o, i = a.weight_shape
    w, c = normal(2, o, i, seed=1), normal(2, a.columns, a.examples, seed=2)
    left, right = normal(o, o, seed=3), normal(i, i, seed=4)
    left, right = left @ left.T, right @ right.T  # sums without cancellation
    assert (b.columns, b.examples, b.weight_shape) == (a.columns, a.examples, (o, i))
    assert b.gram_flops() == a.gram_flops()
    assert b.dense_flops() == a.dense_flops()
    size = float(a.squared_norms().sum())
    near = {"rtol": 1e-12, "atol": 1e-13 * size}
    assert_close(b.project(w), a.project(w), **near)
    assert_close(b.combine(c), a.combine(c), **near)
    assert_close(b.matrices(), a.matrices(), **near)
    each = torch.cat([b.matrices(part) for part in b.parts()], 1)
    assert_close(each, a.matrices(), **near)
    assert_close(b.gram(), a.gram(), **near)
    assert_close(b.squared_norms(), a.squared_norms(), **near)
    assert_close(b.squares(), a.squares(), **near)
    turned = size * float(left.norm() * right.norm())
    for one, other in (
        (b.row_side(right), a.row_side(right)),
        (b.column_side(left), a.column_side(left)),
        (b.kronecker_inner(left, right), a.kronecker_inner(left, right)),
        (b.diagonal_inner(left[0], right), a.diagonal_inner(left[0], right)),
        (b.column_squares(right), a.column_squares(right)),
        (b.rotated_squares(left, right), a.rotated_squares(left, right)),
    ):
        assert_close(one, other, 1e-12, 1e-13 * turned * max(1.0, turned / size))
    assert_close(b.squared_norm(), a.squared_norm(), 1e-12)
    dense = [s.add_dense_(torch.empty(o * i, o * i).double()) for s in (a, b)]
    assert_close(dense[1], dense[0], **near)


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_methods_make_of_stored_statistics_what_they_make_of_held_ones(kind, tmp_path):
    held, stored = both(*problem(kind, 5), tmp_path / "held")
    for name, method in fl.approximators().items():
        told = facts(method)
        if told.takes == "mean_gradient":
            continue
        for layer in [None] if told.couples else held:
            a, b = (s if layer is None else s[layer] for s in (held, stored))
            try:
                expected = method(a)
            except fl.errors.FisherlabError as refusal:
                with pytest.raises(type(refusal)):
                    method(b)
                continue
            found = method(b)
            near = 1e-6 if "kl" in name or "kpsvd" in name else 1e-9
            scale = float(expected.to_dense().abs().max())
            assert_close(found.to_dense(), expected.to_dense(), near, near * scale), name


def seen_twice(method, layer):
    """Return what a method with a state makes of the same statistics, twice."""
    last = method(layer)
    if hasattr(method, "observe"):
        w = normal(*layer.weight_shape, seed=1)
        last = method.observe(last, *(Observation.of(layer, x) for x in (w, 2 * w)))
    return method(layer, previous=last)


@pytest.mark.parametrize(
    "method",
    [fl.CGFAC(), fl.BKFAC(2), fl.BKFAC(2, refresh=fl.Correction()), fl.KBFGS(), fl.SINGD()],
    ids=["cg-fac", "b-kfac", "b-kfac-c", "k-bfgs", "singd"],
)
def test_methods_with_a_state_read_part_by_part(method, tmp_path, monkeypatch):
    monkeypatch.setattr(Stored, "pair", None)  # never all at once
    model = nn.Linear(2, 3).double()
    data = [(normal(2, t, 2, seed=t), torch.zeros(2, t).long()) for t in (1, 4, 2)]
    for number, own in enumerate((problem("shared", 5), (model, data))):
        chunk = None if number else 2
        held, stored = both(*own, tmp_path / str(number), chunk, fisher=fl.Empirical())
        for name, layer in held.items():
            expected = seen_twice(method, layer).to_dense()
            found = seen_twice(method, stored[name]).to_dense()
            assert_close(found, expected, 1e-11, 1e-12 * float(expected.norm()))


@pytest.mark.parametrize("kind", ["outer", pytest.param("shared", marks=SLOW)])
def test_tables_of_stored_statistics_are_those_of_held_ones(kind, tmp_path):
    held, stored = both(*problem(kind, 5), tmp_path / "held")
    asked = {"approximators": ["kfac", "ekfac", "mini-block"], "damping": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (fl.compare(stats, **asked) for stats in (held, stored))
    for name in a.data_vars:  # factors are decomposed in the span of held rows: fewer flops
        if a[name].dtype.kind == "f" and name != "solve_flops":
            there, here = (torch.tensor(ds[name].values) for ds in (b, a))
            assert_close(there, here, 1e-7, 1e-9)


def test_blocks_between_layers_and_the_network_come_from_the_disk(tmp_path):
    held, stored = both(*problem("outer", 5), tmp_path / "held")
    assert_close(fl.full_matrix(stored).values, fl.full_matrix(held).values, 1e-12, 1e-14)
    a, b = (fl.ExactNetwork()(stats) for stats in (held, stored))
    assert_close(b.whole.samples.gram(), a.whole.samples.gram(), 1e-12, 1e-14)
    assert_close(b.frobenius_norm(), a.frobenius_norm(), 1e-12)
    blocks = [op.diagonal_block("2").to_dense() for op in (b, a)]
    assert_close(*blocks, 1e-12, 1e-14)


def test_batches_of_other_lengths_and_columns_are_made_alike(tmp_path):
    model = nn.Linear(2, 3).double()
    data = [(normal(2, t, 2, seed=t), torch.zeros(2, t).long()) for t in (1, 4, 2)]
    held, stored = both(model, data, tmp_path / "held", chunk=None)
    answers(held["weight"].samples, stored["weight"].samples)


def test_a_folder_is_opened_again_and_has_one_model_and_data(tmp_path, monkeypatch):
    model, data = problem("outer", 5)
    folder = tmp_path / "held"
    _, first = both(model, data, folder)
    files = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    monkeypatch.setattr(storing, "_write", None)  # nothing is computed
    _, again = both(model, data, folder)
    assert_close(again["0"].samples.squares(), first["0"].samples.squares(), 0)
    with pytest.raises(DataError, match="differ: fisher"):
        both(model, data, folder, fisher=fl.Empirical())
    for other in ((data[0] + 1, data[1]), (data[0], (data[1] + 1) % 3)):
        with pytest.raises(DataError, match="differ: model and data"):
            both(model, other, folder)
    with monkeypatch.context() as later:
        later.setattr(storing, "FORMAT", storing.FORMAT + 1)
        with pytest.raises(DataError, match="differ: format"):
            both(model, data, folder)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(DataError, match="differ: model and data"):
        both(model, data, folder)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == files
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["held"]


def test_numbers_in_another_shape_are_other_data():
    x, y = torch.zeros(4, 1, 2), torch.zeros(4, 1).long()
    rows, model = (x.view(2, 2, 2), y.view(2, 2)), nn.Linear(2, 3)
    assert storing.fingerprint(model, (x, y)) != storing.fingerprint(model, rows)


def test_one_process_at_a_time_writes_a_folder_and_within_its_budget(tmp_path):
    model, data = problem("outer", 64)
    busy = claimed(tmp_path / ".held.lock", ValueError("held"))
    with busy, pytest.raises(DataError, match="another process is writing"):
        both(model, data, tmp_path / "held")
    own = {"chunk_size": 64, "store": tmp_path / "held", "budget": 1000}
    with pytest.raises(fl.BudgetError, match=r"collect\(store=\) of 64 examples"):
        fl.collect(model, data, fl.Categorical(), **own)
    assert not (tmp_path / "held").exists()


def test_groups_of_rows_lie_in_the_same_files(tmp_path):
    held, stored = both(*problem("grouped", 3), tmp_path / "held")
    groups = zip(held["0"].by_group(), stored["0"].by_group(), strict=True)
    for one, other in groups:
        assert_close(other.samples.squares(), one.samples.squares(), 1e-12, 1e-14)
        first = [layer.samples.matrices(slice(0, 1)) for layer in (other, one)]
        assert_close(*first, 1e-12, 1e-14)  # ends within a part
        assert len(list(other.pieces())) == 2


def test_a_function_is_given_all_inputs_at_once_if_they_fit(tmp_path, monkeypatch):
    model = nn.Linear(2, 3).double()
    data = [(normal(2, t, 2, seed=t), torch.zeros(2, t).long()) for t in (1, 4, 2)]
    held, stored = both(model, data, tmp_path / "held", chunk=None)
    pairs = (layer["weight"].shared("mine") for layer in (held, stored))
    for one, other in zip(*pairs, strict=True):
        assert_close(other, one, 1e-14)
    monkeypatch.setattr(values, "parse_budget", lambda budget: 100)
    with pytest.raises(fl.BudgetError, match="mine of statistics on disk"):
        stored["weight"].shared("mine")


def test_layers_whose_parts_differ_are_stacked_too(tmp_path):
    model, data = problem("outer", 5)
    first, second = (both(model, data, tmp_path / f"{k}", k)[1] for k in (2, 3))
    layers = [first["0"].samples, second["2"].samples]
    found = parted.stacked(layers)
    assert_close(found.gram(), sum(layer.gram() for layer in layers), 1e-12, 1e-14)


def test_damage_strangers_and_lost_files_are_told(tmp_path):
    model, data = problem("outer", 5)
    folder = tmp_path / "held"
    _, stored = both(model, data, folder)
    kept = pickle.dumps(stored)
    part = min(folder.glob("*.pt"))  # of the first block
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="damaged"):
        both(model, data, folder)
    whole, noise = bytearray(part.read_bytes()), np.random.default_rng(0)
    ends = [whole[:size] for size in noise.integers(len(whole) - 1, size=10)]
    flips = [(at, bytes([whole[at] ^ 255])) for at in range(0, len(whole), 61)]
    flipped = [whole[:at] + other + whole[at + 1 :] for at, other in flips]
    for damaged in [b"", noise.bytes(99), *ends, *flipped]:
        part.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            pickle.loads(kept)["0"].samples.squares()
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="is gone"):
        stored["0"].samples.squares()
    folder.mkdir()
    with pytest.raises(DataError, match="holds no statistics"):
        both(model, data, folder)
    with pytest.raises(ValueError, match="gone through once"):
        fl.collect(model, iter([data]), fl.Categorical(), store=tmp_path / "other")


def test_a_broken_run_leaves_nothing_and_is_done_anew(tmp_path):
    model, data = problem("outer", 4)

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fl.collect(model, data, fl.Categorical(), store=tmp_path / "held", progress=stop)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    _, stored = both(model, data, tmp_path / "held")
    assert stored["0"].count == 4


def test_runs_are_as_long_as_a_part_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "PART_BYTES", 1000)
    model, data = problem("outer", 64)
    stored = fl.collect(model, data, fl.Categorical(), store=tmp_path / "held")
    sizes = [file.stat().st_size for file in (tmp_path / "held").glob("*.pt")]
    pieces = list(zip(*(layer.pieces() for layer in stored.values()), strict=True))
    assert len(sizes) == 2 * len(pieces)
    held = [sum(layer.nbytes for layer in piece) for piece in pieces]
    assert max(held) <= 1000 < 2 * held[0]
    assert sum(held) == stored.nbytes


def test_the_bytes_on_a_disk_are_foretold(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "PART_BYTES", 2**20)
    model, data = problem("shared", 2000)
    told = fl.estimate(model, data, fl.Categorical(), ["exact"], budget=2**20)
    fl.collect(model, data, fl.Categorical(), store=tmp_path / "held")
    files = list((tmp_path / "held").glob("*.pt"))
    written = sum(file.stat().st_size for file in files)
    assert told.statistics_bytes < written < told.statistics_bytes + len(files) * 2**13
    told_bytes = fl.numerics.devices.readable(told.statistics_bytes)
    assert f"on a disk, {told_bytes}" in told.advice


WITHIN = """
import sys
from pathlib import Path

import torch
from torch import nn

import fisherlab as fl
from tests.rank_jobs import _resident

torch.manual_seed(0)
examples, width = 65_000, 300
model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, 3))
model = model.double().requires_grad_(False)
model[0].requires_grad_(True)
asked = {"metrics": ["frobenius_error"], "approximators": ["kfac", "ekfac", "kpsvd"]}


def work(stats):
    layer = stats["0"]
    exact = fl.ExactBlock()(layer)
    ones = torch.ones(width, width).double()
    print(exact.trace(), float((exact @ ones).norm()))
    for method in (fl.CGFAC(), fl.BKFAC(8), fl.KBFGS(), fl.SINGD()):
        print(float((method(layer) @ ones).norm()))
    print(fl.compare(stats, **asked)["frobenius_error"].values)


def batches(n):
    for k in range(0, n, 1000):
        noise = torch.Generator().manual_seed(k)
        yield torch.randn(1000, width, generator=noise).double(), torch.zeros(1000).long()


class Data:
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return batches(self.n)


def collected(n, folder):
    labels = fl.MonteCarlo(1)
    return fl.collect(model, Data(n), fl.Categorical(), labels, store=folder, budget=BUDGET)


BUDGET = 96 * 2**20
folder = Path(sys.argv[1])
work(collected(2000, folder / "warm"))
Path("/proc/self/clear_refs").write_text("5")
before = _resident("VmRSS")
stats = collected(examples, folder / "held")
made = _resident("VmHWM") - before
Path("/proc/self/clear_refs").write_text("5")
work(stats)
print(stats.nbytes / BUDGET, made / BUDGET, (_resident("VmHWM") - before) / BUDGET)
"""


@SLOW
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_analyses_of_more_than_the_budget_stay_within_it(tmp_path):
    run = [sys.executable, "-c", WITHIN, str(tmp_path)]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is not held
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=exact)
    assert done.returncode == 0, done.stderr
    size, made, peak = map(float, done.stdout.split()[-3:])
    assert size > 3
    assert made < 1.0
    assert peak < 1.0


@pytest.mark.parametrize("place", ["a file/store", "a file/deep/store", ".", "/proc"])
def test_folders_that_cannot_be_made_or_written_are_refused_by_name(place, tmp_path):
    (tmp_path / "a file").write_text("mine")
    folder = Path(place) if place == "." else tmp_path / place
    if place == "/proc":  # in which nobody can write
        folder = Path("/proc/fisherlab")
    with pytest.raises(DataError, match=r"give (another|a folder)"):
        fl.collect(nn.Linear(2, 1), (torch.ones(2, 2), None), fl.Gaussian(), store=folder)
    assert (tmp_path / "a file").read_text() == "mine"
