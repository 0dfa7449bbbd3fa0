"""Files that are whole or as they were, whatever interrupts the writing."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

import fisherlab as fl
from fisherlab.analysis.files import write_part
from fisherlab.durable import write_durably
from fisherlab.errors import DataError, StoreError
from fisherlab.report.folder import whole_folder
from fisherlab.report.job import rebuild
from fisherlab.training.serialise import pack
from fisherlab.training.store import Checkpoint, Store, load_checkpoint, save_checkpoint
from tests.training_runs import small

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np, xarray as xr, fisherlab as fl
file = Path(sys.argv[1])
big = xr.Dataset({"a": ("x", np.arange(100_000.0))})
if sys.argv[2] == "tree":
    big = xr.DataTree.from_dict({"/node": big})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
fl.save(xr.Dataset({"old": 1.0}), file)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    fl.save(big, file)
except OSError:
    print(*fl.open(file), [one.name for one in file.parent.iterdir()])
"""


@pytest.mark.slow  # a process of its own: the symptom was its death
@pytest.mark.parametrize("kind", ["dataset", "tree"])
def test_a_full_disk_is_an_error_and_leaves_the_old_file(kind, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.nc"), kind],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "old ['a.nc']"


def interrupted(move, at):
    """Make the `at`-th of the moves end in Ctrl-C, just after it was done."""
    count = 0

    def moved(path, to):
        nonlocal count
        count += 1
        done = move(path, to)
        if count == at:
            raise KeyboardInterrupt
        return done

    return moved


def test_an_interrupted_save_of_a_zarr_folder_leaves_the_old_one(tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    target = fl.save(xr.Dataset({"a": ("x", [1.0])}), tmp_path / "a.zarr")
    new = xr.Dataset({"a": ("x", [2.0])})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted(Path.rename, at=1))
        with pytest.raises(KeyboardInterrupt):
            fl.save(new, target)
    assert float(fl.open(target)["a"][0]) == 1.0
    assert [one.name for one in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupted_overwrite_leaves_the_old_report(at, tmp_path, monkeypatch):
    names = ("report.html", "run.json")
    target = tmp_path / "report"
    target.mkdir()
    for name in (*names, "mine.txt"):
        (target / name).write_text("old")

    def overwrite():
        with whole_folder(target, target, overwrite=True, owned=names) as (scratch, _):
            for name in names:
                (scratch / name).write_text("new")
            monkeypatch.setattr(Path, "replace", interrupted(Path.replace, at))

    with pytest.raises(KeyboardInterrupt):
        overwrite()
    left = {file.name: file.read_text() for file in target.iterdir()}
    assert left == dict.fromkeys((*names, "mine.txt"), "old")
    assert list(tmp_path.iterdir()) == [target]


def followed(store, steps, every=2):
    problem = small()
    sgd = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    probes = [fl.probes.Losses()]
    return fl.follow(problem, sgd, steps=steps, every=every, store=store, probes=probes)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lose(name):
    return lambda store, early: (store / name).unlink()


def copy_of_a_part(store, early):
    part = store / "results-000000000-000000000.nc"
    (store / "results-000000000-000000001.nc").write_bytes(part.read_bytes())


STORES = {
    "the checkpoint is lost": (lose("checkpoint.pt"), {"steps": 8}, "no checkpoint.pt"),
    "the checkpoint is lost, fewer steps": (
        lose("checkpoint.pt"),
        {"steps": 2},
        "no checkpoint.pt",
    ),
    "an earlier checkpoint, other moments": (
        lambda store, early: (store / "checkpoint.pt").write_bytes(early),
        {"steps": 8, "every": 1},
        "has not measured",
    ),
    "fewer steps": (lambda store, early: None, {"steps": 2}, "cannot go back"),
    "the first results are lost": (
        lose("results-000000000-000000000.nc"),
        {"steps": 8},
        "does not hold the results",
    ),
    "results are there twice": (copy_of_a_part, {"steps": 8}, "does not hold the results"),
    "the record is a list": (
        lambda store, early: (store / "run.json").write_text("[]"),
        {"steps": 8},
        "not the record",
    ),
    "the record is lost": (lose("run.json"), {"steps": 8}, "other files"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store at step 6, and its checkpoint of step 2."""
    store = tmp_path_factory.mktemp("trained") / "run"
    followed(store, 2)
    early = (store / "checkpoint.pt").read_bytes()
    followed(store, 6)
    return store, early


@pytest.mark.parametrize("case", STORES)
def test_nothing_is_removed_from_a_store_that_is_refused(case, trained, tmp_path):
    damage, asked, named = STORES[case]
    store = shutil.copytree(trained[0], tmp_path / "run")
    damage(store, trained[1])
    before = content(store)
    with pytest.raises(ValueError, match=named):
        followed(store, **asked)
    assert content(store) == before


def test_a_store_that_lost_a_part_is_not_opened_as_if_it_were_whole(trained, tmp_path):
    store = shutil.copytree(trained[0], tmp_path / "run")
    (store / "results-000000002-000000002.nc").unlink()
    with pytest.raises(DataError, match="does not hold the results up to step 2"):
        fl.open(store)


def test_moves_of_a_killed_process_are_finished_by_the_next_one(tmp_path):
    target = tmp_path / "out"
    for folder, files in {
        target: {"a": "new", "mine": "kept"},
        tmp_path / ".out.7": {"b": "new"},
        tmp_path / ".out.7.old": {"a": "old", "b": "old"},
        tmp_path / ".out.8": {"a": "unfinished"},
    }.items():
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with suppress(KeyError), whole_folder(target, target, overwrite=True):
        raise KeyError
    assert {p.name: p.read_text() for p in target.iterdir()} == {
        "a": "new",
        "b": "new",
        "mine": "kept",
    }
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_writer_left_is_swept_by_a_later_one(tmp_path):
    stale, fresh = (tmp_path / f".partial-{n}-a.txt" for n in (7, 8))
    for path in (stale, fresh):
        path.write_text("half")
    os.utime(stale, (0, 0))
    write_durably(tmp_path / "a.txt", lambda path: path.write_text("whole"))
    assert sorted(tmp_path.iterdir()) == [fresh, tmp_path / "a.txt"]


def test_other_files_beside_the_results_are_left_alone(trained, tmp_path):
    store = shutil.copytree(trained[0], tmp_path / "run")
    (store / "results-old.nc").write_text("mine")
    assert followed(store, 6).test_loss.equals(fl.open(trained[0]).test_loss)
    assert (store / "results-old.nc").read_text() == "mine"


def table():
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    coords = {"layer": ["a", "ä"], "step": [0, 1, 2]}
    return xr.Dataset({"error": (("layer", "step"), values.numpy())}, coords, {"n": "1"})


def saved_dataset(folder, trained):
    return fl.save(table(), folder / "a.nc"), fl.open, fl.open(folder / "a.nc")


def saved_tree(folder, trained):
    tree = xr.DataTree.from_dict({"/one": table(), "/two": table()})
    return fl.save(tree, folder / "a.nc"), fl.open, fl.open(folder / "a.nc")


def saved_part(folder, trained):
    name = "results-000000000-000000000.nc"
    file = Path(shutil.copy(trained[0] / name, folder))
    return file, lambda path: fl.open(path.parent), fl.open(folder)


def checkpoint(folder, trained):
    file = Path(shutil.copy(trained[0] / "checkpoint.pt", folder))
    return file, load_checkpoint, load_checkpoint(file)


def unsealed_checkpoint(folder, trained):
    file, read, whole = checkpoint(folder, trained)
    file.write_bytes(file.read_bytes().rpartition(b"\nfisherlab")[0])
    return file, read, whole


def damaged(whole, count=40):
    """Give a file with one bit changed somewhere, or cut off somewhere."""
    draw = random.Random(0)
    for k in range(count):
        at = draw.randrange(len(whole))
        changed = bytes([whole[at] ^ 1 << draw.randrange(8)])
        yield whole[:at] + (b"" if k % 4 == 0 else changed + whole[at + 1 :])


def identical(found, whole):
    if isinstance(whole, (xr.Dataset, xr.DataTree)):
        return found.identical(whole)
    return repr(pack(vars(found))) == repr(pack(vars(whole)))


def saved_zarr(folder, trained):
    pytest.importorskip("zarr")
    target = fl.save(table(), folder / "a.zarr")
    file = next(path for path in (target / "error").iterdir() if path.name[0] != ".")
    return file, lambda path: fl.open(target), fl.open(target)


FILES = [saved_zarr, saved_dataset, saved_tree, saved_part, checkpoint, unsealed_checkpoint]


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_refused_or_read_as_it_was(kind, trained, tmp_path):
    file, read, whole = kind(tmp_path, trained)
    assert identical(read(file), whole)
    refused = 0
    for content in damaged(file.read_bytes()):
        file.write_bytes(content)
        try:
            assert identical(read(file), whole)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
            assert str(tmp_path) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 10


def test_files_without_a_hash_are_read(trained, tmp_path):
    file = tmp_path / "a.nc"
    table().to_netcdf(file, engine="h5netcdf")
    assert fl.open(file).identical(table())
    old, read, whole = unsealed_checkpoint(tmp_path, trained)
    assert identical(read(old), whole)


DIAGONAL = "fisherlab.operators.diagonal:Diagonal"
HOSTILE = {
    "a missing module": {"memories": {"__kind__": "fisherlab.nope:X", "fields": {}}},
    "no fields": {"memories": {"__kind__": "slice"}},
    "no text": {"memories": {"__kind__": 3, "fields": {}}},
    "a list of fields": {"memories": {"__kind__": DIAGONAL, "fields": [1]}},
    "a slice of five": {"memories": {"__kind__": "slice", "fields": (1, 2, 3, 4, 5)}},
    "a class": {"memories": {"__kind__": DIAGONAL, "fields": {"__class__": 3}}},
    "fields missing": {"memories": {0: {"__kind__": DIAGONAL, "fields": {}}}},
    "a key more": {"more": 1},
    "text": {"step": "x"},
    "a step before the first": {"step": -5},
    "no losses": {"losses": None},
    "other weights": {"model": {"0.weight": torch.ones(1), "0.bias": torch.ones(5)}},
    "another optimiser": {"optimizer": {"param_groups": 3}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_checkpoint_of_wrong_parts_is_refused_in_a_sentence(case, trained, tmp_path):
    store = shutil.copytree(trained[0], tmp_path / "run")
    file = store / "checkpoint.pt"
    torch.save(torch.load(file, weights_only=True) | HOSTILE[case], file)
    before = content(store)
    problem = small()
    weights = {k: v.clone() for k, v in problem.model.state_dict().items()}
    sgd = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    probes = [fl.probes.Losses()]
    with pytest.raises(ValueError, match="checkpoint"):
        fl.follow(problem, sgd, steps=8, every=2, store=store, probes=probes)
    assert content(store) == before
    left = problem.model.state_dict()
    assert all(torch.equal(left[name], weight) for name, weight in weights.items())


GRID = {"lr": [1e-4, 0.1]}


def sgd(problem, lr):
    return torch.optim.SGD(problem.model.parameters(), lr=lr)


def searched(store):
    options = {"steps": 4, "every": 2, "batch_size": 8, "prune": False}
    return fl.tune(small, {"sgd": sgd}, GRID, store=store, **options)


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    store = tmp_path_factory.mktemp("search") / "run"
    return store, searched(store)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def other_numbers(path):
    ds = fl.open(path)
    fl.save(ds.assign(train_loss=ds.train_loss + 1), path)


def other_journal(path):
    journal = path.parents[1] / "study.log"
    journal.write_text(journal.read_text().replace("{", "[", 3))


@pytest.mark.parametrize("damage", [cut, Path.unlink, other_numbers, other_journal])
def test_a_damaged_trial_is_not_taken_for_a_good_one(damage, search, tmp_path):
    pytest.importorskip("optuna")
    store = shutil.copytree(search[0], tmp_path / "run")
    best = next(store.glob("sgd-lr-0.1-*"))
    damage(max(best.glob("results-*.nc")))
    before = content(best)
    with pytest.raises(ValueError, match=r"not what the search found|damaged"):
        searched(store)
    assert content(best) == before


def test_a_trial_whose_folder_is_gone_is_run_again(search, tmp_path):
    pytest.importorskip("optuna")
    store = shutil.copytree(search[0], tmp_path / "run")
    shutil.rmtree(next(store.glob("sgd-lr-0.1-*")))
    again = searched(store)
    assert again.drop_vars("seconds").equals(search[1].drop_vars("seconds"))
    assert float(fl.training.best_runs(again).lr[0]) == 0.1


def write_report(out, name, overwrite=False):
    with whole_folder(out, out, overwrite=overwrite, owned=("page",)) as (scratch, _):
        (scratch / "page").write_text(name)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_second_of_two_reports_into_one_folder_is_refused(overwrite, tmp_path):
    out = tmp_path / "new" / "report"
    with whole_folder(out, out, overwrite=overwrite, owned=("page",)) as (scratch, _):
        (scratch / "page").write_text("first")
        with pytest.raises(ValueError, match="Another process is writing into"):
            write_report(out, "second", overwrite)
    assert content(out) == {"page": b"first"}
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_report(out, "second")
    write_report(out, "second", overwrite=True)
    assert content(out) == {"page": b"second"}
    assert list(out.parent.iterdir()) == [out]


STEP = torch.optim.lr_scheduler.StepLR


class Scaled:
    """A probe that shows no settings."""

    def __init__(self, by):
        self.by = by

    def __call__(self, moment):
        return xr.Dataset({"number": float(self.by)})


class Squared(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class Cubed(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 3


Cubed.__qualname__ = Cubed.__name__ = "Squared"


def made(
    store, steps, *, by=1.0, size=8, flip=False, every=5, decay=0.0, probe=1, kind=Squared
):
    problem = small()
    model = kind(4, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.fill_(0.1)
    (x, y), test = problem.train, problem.test
    x, y = x.repeat(15, 1), y.repeat(15)
    if flip:  # what a sample of every second label does not see
        y[1::2] = (y[1::2] + 1) % 3
    problem = replace(
        problem, model=model, train=(x, y), test=test, augment=lambda x, _: by * x
    )
    groups = [{"params": [model.weight], "weight_decay": decay}, {"params": [model.bias]}]
    return fl.follow(
        problem,
        torch.optim.SGD(groups, lr=0.1),
        steps=steps,
        every=2,
        batch_size=lambda _: size,
        scheduler=lambda optimizer: STEP(optimizer, every),
        probes=[Scaled(probe)],
        store=store,
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    store = tmp_path_factory.mktemp("recorded") / "run"
    made(store, 2)
    return store


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"by": 0.0}, "code of augment"),
        ({"size": 9}, "code of batch_size"),
        ({"flip": True}, "labels"),
        ({"every": 6}, "scheduler step_size is 5 there and 6 here"),
        ({"decay": 0.1}, "group 0 weight_decay is 0.0 there and 0.1 here"),
        ({"probe": 2}, "probe 0 by is 1 there and 2 here"),
        ({"kind": Cubed}, "code of model"),
    ],
)
def test_a_run_does_not_go_on_under_other_settings(change, named, recorded, tmp_path):
    store = shutil.copytree(recorded, tmp_path / "run")
    with pytest.raises(ValueError, match=f"another training: {named}"):
        made(store, 4, **change)


def test_a_record_of_an_earlier_version_goes_on(recorded, tmp_path):
    store = shutil.copytree(recorded, tmp_path / "run")
    record = json.loads((store / "run.json").read_text())
    new = ("group", "scheduler ", "probe ", "code", "labels", "augment")
    old = {n: v for n, v in record["settings"].items() if not n.startswith(new)}
    assert len(old) < len(record["settings"]) - 9
    (store / "run.json").write_text(json.dumps(record | {"settings": old}))
    assert made(store, 4).step.values.tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="code of augment"):  # is known from now on
        made(store, 6, by=0.0)


def one(value):
    return xr.Dataset({"loss": ("step", [value])}, {"step": [3]})


def save_figure(file, value):
    axes = Figure().subplots()
    return fl.plots.save(axes, file, pd.DataFrame({"a": [value]}), formats=("svg",))


def state(value):
    return Checkpoint(int(value), {}, {}, None, {}, 0.0, (0.0, 0), ())


WRITERS = {
    "a.nc": (lambda f, v: fl.save(one(v), f), lambda f: float(fl.open(f).loss[0])),
    "a.pt": (lambda f, v: save_checkpoint(state(v), f), lambda f: load_checkpoint(f).step),
    "results-000000003-000000003.nc": (
        lambda f, v: write_part(one(v), f.parent),
        lambda f: float(fl.open(f.parent).loss[0]),
    ),
    "run.json": (
        lambda f, v: Store(f.parent).write_record({"settings": {"v": v}, "sessions": []}),
        lambda f: Store(f.parent).record()["settings"]["v"],
    ),
    "figure.csv": (
        lambda f, v: save_figure(f.with_suffix(""), v),
        lambda f: float(pd.read_csv(f).a[0]),
    ),
}


class Death(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_dies_at_its_move_leaves_old_or_new(
    name, before, tmp_path, monkeypatch
):
    write, read = WRITERS[name]
    file = tmp_path / name
    write(file, 1.0)
    real = os.replace

    def die(source, target):
        if Path(target) != file or not before:
            real(source, target)
        if Path(target) == file:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nor is anything put right
        with pytest.raises(Death):
            write(file, 2.0)
    assert read(file) == (1.0 if before else 2.0)
    write(file, 3.0)  # what is left does no harm
    assert read(file) == 3.0


def test_files_get_their_names_in_few_places():
    """All writers go through `durable`; folders and the cache of data are moved whole."""
    root = Path(fl.__file__).parent
    moves = re.compile(r"os\.(replace|rename)\(|\.rename\(target|shutil\.move\(")
    found = {
        str(p.relative_to(root)) for p in root.rglob("*.py") if moves.search(p.read_text())
    }
    assert found == {"durable.py", "analysis/files.py"}


@pytest.mark.parametrize("again", [False, True])
def test_a_store_that_is_emptied_during_a_run_is_noticed(again, tmp_path):
    store = tmp_path / "run"

    def empty(moment):
        if moment.step == 2:
            shutil.rmtree(store)
            if again:
                store.mkdir()
        return xr.Dataset({"loss": 0.0})

    problem = small()
    options = {"steps": 4, "every": 1, "checkpoint_seconds": 0.0, "probes": [empty]}
    adam = torch.optim.Adam(problem.model.parameters())
    with pytest.raises(StoreError, match=r"run.json was removed"):
        fl.follow(problem, adam, store=store, **options)


FAULTS = {
    "labels": lambda ds: ds.assign_coords(approximator=[1, 2]),
    "twins": lambda ds: ds.assign_coords(approximator=["kfac", "kfac"]),
    "one layer": lambda ds: ds.isel(layer=0),
    "truth": lambda ds: ds.assign(frobenius_error=ds.frobenius_error > 0.2),
    "complex": lambda ds: ds.assign(frobenius_error=ds.frobenius_error + 1j),
    "no methods": lambda ds: ds.assign(frobenius_error=ds.frobenius_error[:, 0]),
    "another axis": lambda ds: ds.expand_dims(mine=[1, 2]),
    "no steps": lambda ds: ds.expand_dims(step=np.zeros(0, int)),
    "half steps": lambda ds: ds.expand_dims(step=[0.5]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_table_is_refused_before_a_page_is_begun(fault, tmp_path):
    coords = {"layer": ["a", "b"], "approximator": ["kfac", "exact"]}
    error = xr.DataArray([[0.1, 0.2], [0.3, 0.4]], coords)
    ds = xr.Dataset({"frobenius_error": error})
    file = fl.save(FAULTS[fault](ds), tmp_path / "a.nc")
    with pytest.raises(ValueError, match="holds no table of layers and approximations: "):
        rebuild(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.nc"]
