"""What the ranks of a process group do in the tests, and how they are started."""

import datetime
import os
import signal
import time
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch
from torch import distributed, nn
from torch import multiprocessing as mp

import fisherlab as fl
from fisherlab.approximators import kpsvd_choice as choice
from fisherlab.numerics.ranks import counted
from fisherlab.training.run import Run
from tests.training_runs import small

TIMEOUT = 400  # seconds until a rank that hangs ends the test


def started(job, ranks, folder, timeout):
    """Start a job in processes of a gloo group."""
    args = (job, ranks, str(folder), timeout)
    return mp.start_processes(_begun, args, ranks, join=False, start_method="spawn")


def spawned(job, ranks, folder):
    """Run a job in processes of a gloo group; return what each of them saved."""
    running = started(job, ranks, folder, TIMEOUT / 2)
    end = time.monotonic() + TIMEOUT
    try:
        while not running.join(end - time.monotonic()):
            assert time.monotonic() < end, "a rank hangs"
    finally:
        for process in running.processes:
            process.kill()
    return saved(ranks, folder)


def saved(ranks, folder):
    """Return what each of some ranks saved."""
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(ranks)]


def _begun(rank, job, ranks, folder, timeout):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        torch.save(job(rank, ranks, Path(folder)), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@dataclass(frozen=True)
class Noted:
    """Sampled labels that are written down as they are drawn, by index of the example."""

    inner: fl.MonteCarlo
    drawn: dict = field(default_factory=dict, compare=False)

    def column_count(self, likelihood, output):
        return self.inner.column_count(likelihood, output)

    def columns(self, likelihood, output, target, first_example, part):
        for draw in range(part.start, part.stop):
            labels = self.inner.labels(likelihood, output, first_example, draw)
            for k, label in enumerate(labels.tolist()):
                self.drawn[first_example + k, draw] = label
        return self.inner.columns(likelihood, output, target, first_example, part)


def network():
    """A small network with a convolution, norm layer and linear layers, and 11 examples."""
    noise = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3), nn.Tanh()
    )
    model = model.append(nn.Linear(3, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=noise) / 2)
    x = torch.randn(11, 1, 3, 3, generator=noise, dtype=torch.float64)
    return model, x, torch.arange(11) % 3


def part(x, y, rank, ranks):
    """Uneven parts: for two ranks 8 and 3 examples, for four 5, 0, 3 and 3."""
    bounds = {1: [0, 11], 2: [0, 8, 11], 4: [0, 5, 5, 8, 11]}[ranks]
    piece = slice(bounds[rank], bounds[rank + 1])
    return x[piece], y[piece]


def _diagonal(statistics):
    return fl.Diagonal()(statistics)


def dense(found):
    """Return the matrices of an `approximate`."""
    return {
        (name, block): op.to_dense()
        for name, ops in found.items()
        for block, op in (ops.items() if isinstance(ops, dict) else [("", ops)])
    }


def approximations(rank, ranks, folder=None):
    """Approximate by every method on uneven parts: exact, sampled, and in batches."""
    model, x, y = network()
    x, y = part(x, y, rank, ranks)
    lik, every = fl.Categorical(), fl.approximators()
    joint = {**every, **fl.network_approximators(), "a function": _diagonal}
    joint |= {"passes": fl.KPSVD(2, solver=fl.Passes())}
    layers = ["3", "5"]  # used at one position, as methods of networks need it
    exact = fl.approximate(model, (x, y), lik, joint, layers=layers)
    noted = Noted(fl.MonteCarlo(2, seed=5))
    sampled = fl.approximate(model, (x, y), lik, every, noted)
    means = fl.approximate(model, (x, y), lik, fl.preconditioners(), fl.Empirical())
    pairs = [(x[k : k + 2], y[k : k + 2]) for k in range(0, len(x), 2)]
    small = ["kfac", "ekfac", "exact"]
    batches = fl.approximate(model, pairs, lik, small, fl.MonteCarlo(), first=4)
    found = {"exact": dense(exact), "sampled": dense(sampled), "batches": dense(batches)}
    return found | {"means": dense(means), "labels": noted.drawn}


def by_parts(rank, ranks, folder=None):
    """Approximate groups of rows, a weight of two uses, and samples too many to gather."""
    plain, x, y = network()
    grouped = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(12, 3))
    rows = x.flatten(1)[:, :8].unflatten(1, (2, 4))
    sums, lik = ["kfac", "ekfac"], fl.Categorical()
    passed = [*sums, "kpsvd", "deflation", "kfac-corrected"]
    found, kept = {}, choice.HELD_BYTES
    for net, seen, layer, methods in (
        (plain, x, "3", passed),
        (grouped, rows, "0", passed),
        (Twice(), x, "table", sums),
    ):
        held = fl.collect(of_seed(net), (seen, y), lik, layers=[layer])[layer]
        # A rank holds its own samples, but not those of all.
        choice.HELD_BYTES = held.by_group()[0].nbytes - 1
        own = part(seen, y, rank, ranks)
        with counted() as told:
            ops = fl.approximate(net, own, lik, methods, layers=[layer])
        found[layer] = dense(ops), told
    choice.HELD_BYTES = kept
    return found


class Twice(nn.Module):
    """A weight that is used in two ways: an embedding's, and the last layer's."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, x):
        rows = x.flatten(1)[:, :2].abs().long() % 3
        return torch.tanh(self.table(rows)).mean(1) @ self.table.weight.T


def of_seed(model):
    """Return a model with weights of its own seed."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(torch.randn(p.shape, generator=noise) / 2)
    return model


TOGETHER = ["exact", "mini-block", "ekfac"]  # the first two share samples


def one_by_one():
    """Return every registered method of blocks, and data that ranks share evenly."""
    methods = {**fl.approximators(), **fl.preconditioners()}
    model, x, y = network()
    return model, (x[:8], y[:8]), fl.Categorical(), methods, fl.MonteCarlo()


def sent(rank, ranks, folder=None):
    """Count what is sent for every method by itself, and for three together."""
    model, batch, lik, methods, fisher = one_by_one()
    here = slice(8 * rank // ranks, 8 * (rank + 1) // ranks)
    own = batch[0][here], batch[1][here]
    found = {}
    for name, chosen in (*((one, [one]) for one in methods), ("together", TOGETHER)):
        with counted() as told:
            fl.approximate(model, own, lik, chosen, fisher)
        found[name] = told
    return found


def steps(rank, ranks, folder=None):
    """Count what a first step of every method sends."""
    _, batch, lik, _, fisher = one_by_one()
    here, found = slice(8 * rank // ranks, 8 * (rank + 1) // ranks), {}
    for name in [*fl.approximators(), *fl.preconditioners()]:
        how = {"damping": 10.0, "fisher": fisher, "average": 0.0}
        optimiser = fl.NaturalGradient(network()[0], lik, name, lr=0.1, **how)
        with counted() as told:
            optimiser.step(batch=(batch[0][here], batch[1][here]))
        found[name] = sum(told.values())
    return found


def wide(kind):
    """Return a network, data and a method of which sums, passes or samples are large."""
    sizes, method = {
        "sums": ((2000, 1500), "kfac"),
        "passes": ((500, 300), "kfac"),
        "samples": ((500, 300), "exact"),
    }[kind]
    model = nn.Sequential(nn.Linear(*sizes), nn.Tanh(), nn.Linear(sizes[1], 10)).double()
    count = 400 if kind == "sums" else 8000
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(count, sizes[0], generator=noise, dtype=torch.float64)
    return model, (x, torch.arange(count) % 10), fl.Categorical(), method, fl.MonteCarlo()


def _resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(one for one in lines if one.startswith(what)).split()[1])


def peak(rank, ranks, folder, kind):
    """Return how many bytes this process has grown by at most, while it approximates."""
    torch.manual_seed(0)  # of this process: the same weights on all ranks
    model, (x, y), lik, method, fisher = wide(kind)
    own = x[rank * len(x) // ranks :][: len(x) // ranks].clone(), y[: len(x) // ranks]
    few = own[0][:2, :3], own[1][:2]
    fl.approximate(nn.Linear(3, 10).double(), few, lik, method, fisher)
    del x
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = _resident("VmRSS")
    kept = fl.approximate(model, own, lik, method, fisher)
    grown = _resident("VmHWM") - before
    del kept
    return grown


def comparison(rank, ranks, folder):
    """Compare straight from the model: data gathered, layers dealt, one store."""
    model, x, y = network()
    data, lik = part(x, y, rank, ranks), fl.Categorical()
    how = {"damping": 0.1, "store": folder / f"store_{ranks}.nc", "budget": "1 GiB"}
    tables = [fl.compare(model, data, lik, ["kfac", "ekfac"], **how) for _ in range(2)]
    asked = {"purpose": fl.Sharpness(), "budget": "1 GiB"}
    tables.append(fl.compare(model, data, lik, ["kfac"], fisher=fl.MonteCarlo(), **asked))
    return [{n: v.values for n, v in t.items() if v.dtype == float} for t in tables]


def _natural(approximator, damping=0.1, **more):
    def make(model):
        how = {"lr": 0.1, "damping": damping, **more}
        return fl.NaturalGradient(model, fl.Categorical(), approximator, **how)

    return make


def _adaptive(model):
    some = {"statistics_fraction": 0.5, "curvature_fraction": 0.25}
    return fl.AdaptiveKFAC(model, fl.Categorical(), inverse_every=3, **some)


NEAR = 1e-10  # a relative change of weights that a training should hardly feel
FEW = {"statistics_fraction": 0.4}  # of 11 examples those of the first of two ranks
OPTIMISERS = {
    "kfac": _natural("kfac", fl.Factored(0.1), clip=fl.training.KLClip(1e-2)),
    "ekfac": _natural("ekfac", statistics_every=2, inverse_every=4, **FEW),
    "kept basis": _natural(fl.SOAP(keep_basis=True), fl.RelativeDamping(1.0)),
    "kpsvd-2": _natural("kpsvd-2", momentum_of="gradient"),
    "exact": _natural("exact", average=0.0, **FEW),
    "of mean gradients": _natural("shampoo-mean"),
    "sampled mean gradients": _natural("mini-block-mean", fisher=fl.MonteCarlo(), **FEW),
    "coupled": _natural("kfac-tridiagonal", fl.Factored(0.1), **FEW),
    "learning": _natural("k-bfgs", average=0.0),
    "exact labels": _natural("kfac", fl.Factored(0.1), fisher=fl.Exact()),
    "adaptive": _adaptive,
}


def begun(noise):
    """Return the network that is trained, with weights drawn from `noise`."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=noise))
    return model


def trained(make, rank, ranks, *, replicated=False, closure=False, even=False, told=None):
    """Take ten steps on parts of batches; return losses and weights, tell what is sent."""
    noise = torch.Generator().manual_seed(1)
    model = begun(noise)
    called = nn.parallel.DistributedDataParallel(model) if replicated else model
    optimiser, lik, losses = make(called), fl.Categorical(), []
    for _ in range(10):
        x = torch.randn(11, 4, generator=noise, dtype=torch.float64)
        y = torch.randint(0, 3, (11,), generator=noise)
        if even:
            x, y = (t[:8].chunk(ranks)[rank] for t in (x, y))
        else:
            x, y = part(x, y, rank, ranks)

        def computed(x=x, y=y):
            optimiser.zero_grad()
            loss = lik.loss(called(x), y).mean()
            loss.backward()
            return loss

        how = (computed,) if closure else ()
        with counted() as sent:
            losses.append(float(optimiser.step(*how, batch=(x, y))))
        if told is not None:
            told.append(sent)
    return {"losses": losses, **{n: p.detach() for n, p in model.named_parameters()}}


@cache
def rounding():
    """Return how far ten adaptive steps may drift apart by rounding.

    Their lengths are those of the quadratic model, about 1, so that the steps move apart
    what begins near: 1e-10 on the weights grows 2e4 to 6e4 times, whatever inverts the
    factors, whose condition is below 9. Sixteen roundings grow as much.
    """

    def moved(seed):
        noise = torch.Generator().manual_seed(seed)

        def make(model):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + NEAR * torch.randn(p.shape, generator=noise, dtype=p.dtype))
            return _adaptive(model)

        return trained(make, 0, 1)

    here = trained(_adaptive, 0, 1)
    apart = [
        float((found[name] - here[name]).abs().max())
        for found in map(moved, range(2))
        for name in found.keys() - {"losses"}
    ]
    return 16 * torch.finfo(torch.float64).eps * max(apart) / NEAR


def trainings(rank, ranks, folder=None):
    """Train by every kind of optimiser, on plain models and on those in DDP."""
    told = {name: [] for name in OPTIMISERS}
    found = {
        name: trained(make, rank, ranks, told=told[name])
        for name, make in OPTIMISERS.items()
    }
    found["sent"] = told
    for name in ("kfac", "adaptive"):
        make = OPTIMISERS[name]
        found[f"{name} in DDP"] = trained(make, rank, ranks, replicated=ranks > 1)
    for name, wrapped in (("closure", False), ("closure in DDP", ranks > 1)):
        how = {"replicated": wrapped, "closure": True, "even": True}
        found[name] = trained(OPTIMISERS["kfac"], rank, ranks, **how)
    found["uneven closure"] = trained(OPTIMISERS["kfac"], rank, ranks, closure=True)
    return found


def recipes(rank, ranks, folder=None, group=0):
    """Take ten steps by a quarter of the optimisers, in DDP on several ranks."""
    return {name: by_recipe(name, ranks) for name in [*fl.training.optimizers()][group::4]}


def by_recipe(name, ranks):
    recipe, problem = fl.training.optimizers()[name], small()
    model, (x, y) = problem.model, problem.train
    if ranks > 1:
        problem = replace(problem, model=nn.parallel.DistributedDataParallel(model))
    asked = {"warm_start": None}
    asked = {key: value for key, value in asked.items() if key in recipe.settings}
    optimiser, losses, told = recipe(problem, **asked), [], []
    for step in range(10):
        batch = x[step % 2 :: 2], y[step % 2 :: 2]
        with counted() as sent:
            losses.append(fl.training.take_step(problem, optimiser, batch, step))
        told.append(sent)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"losses": torch.tensor(losses).double(), **weights}, told


def killed(rank, ranks, folder):
    """Follow a training of which the last rank dies in the middle of it."""
    real = Run.advance

    def advance(run):
        if run.step == 7 and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run)

    Run.advance = advance
    torch.save(said(partial(gone_on, rank, ranks, folder)), folder / f"told_{rank}.pt")


def gone_on(rank, ranks, folder):
    """Follow that training to its end, from its last checkpoint if it has one."""
    problem, how = small(), {"store": folder / "store", "checkpoint_seconds": 0.0}
    ds = fl.follow(problem, "kfac", steps=12, every=4, batch_size=10, **how)
    found = {n: v.values for n, v in ds.items() if "seconds" not in n}
    return found | {n: p.detach().numpy() for n, p in problem.model.named_parameters()}


def followed(rank, ranks, folder):
    """Follow trainings whose batches are shared out, each in one store, in two sessions."""
    found = {}
    for name in ("sgd-momentum", "kfac"):
        how = {"batch_size": 11, "store": folder / f"{name}_{ranks}"}
        for steps, every in ((4, [0, 3, 4]), (6, [0, 3, 4, 6])):
            problem = small()
            with mock.patch("os.replace", wraps=os.replace) as written:
                ds = fl.follow(problem, name, steps=steps, every=every, **how)
        found[name] = {n: v.values for n, v in ds.items() if "seconds" not in n}
        found[name] |= {n: p.detach().numpy() for n, p in problem.model.named_parameters()}
        found[f"files of {name}"] = written.call_count
    return found


def refusals(rank, ranks):
    """Collect what every rank says of a failure that is one rank's, or nobody's."""
    model, x, y = network()
    if rank == ranks - 1:
        x = x.clone().fill_(torch.nan)
    lik, found = fl.Categorical(), {}
    found["a bad part"] = said(fl.approximate, model, (x, y), lik, ["kfac"])
    found["no part"] = said(fl.approximate, model, (x[:0], y[:0]), lik, ["kfac"])
    one = (item for item in [(torch.ones_like(x), y)])
    found["read once"] = said(fl.approximate, model, one, lik, "kfac", fl.MonteCarlo())
    chosen = ["kfac"] if rank else ["kfac", "ekfac"]
    good = torch.ones_like(x), y
    found["other methods"] = said(fl.approximate, model, good, lik, chosen)
    norm, one = small(), small()
    norm.model.norm = nn.BatchNorm1d(2)
    found["batch norm"] = said(fl.follow, norm)
    found["one example"] = said(partial(fl.follow, batch_size=1), one)
    found["other seeds"] = said(partial(fl.follow, small(), seed=rank))
    with torch.no_grad():
        model[0].weight += rank
    found["other weights"] = said(fl.approximate, model, good, lik, ["kfac"])
    return found


def unequal(rank, ranks):
    """Step through a batch more on the first rank, while others go on to something else."""
    model, x, y = network()
    optimiser = OPTIMISERS["kfac"](model)
    for _ in range(2 - rank):
        told = said(partial(optimiser.step, batch=(x, y)))
    if rank:
        told = said(fl.approximate, model, (x, y), fl.Categorical(), ["kfac"])
    return told


def left_alone(rank, ranks, folder, how):
    """Take steps, of which the last rank takes fewer: it dies, hangs or leaves."""
    model, x, y = network()
    optimiser = OPTIMISERS["kfac"](model)
    for step in range(4):
        if rank == ranks - 1 and step == 2:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "hangs":
                time.sleep(TIMEOUT)
            return None
        begun = time.monotonic()
        told = said(partial(optimiser.step, batch=(x, y)))
        if told is not None:
            torch.save((*told, time.monotonic() - begun), folder / f"told_{rank}.pt")
            return told
    return None


def said(call, *args):
    """Return the type of what a call raises, its message and its notes."""
    try:
        call(*args)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "__notes__", [])
    return None


def everything(rank, ranks, folder):
    """Do all of it in one group: starting one takes longer."""
    return {
        "comparison": comparison(rank, ranks, folder),
        "trainings": trainings(rank, ranks),
        "followed": followed(rank, ranks, folder),
        "approximations": approximations(rank, ranks),
        "by parts": by_parts(rank, ranks),
        "sent": sent(rank, ranks) if ranks > 1 else {},
        "refusals": refusals(rank, ranks) if ranks > 1 else {},
        "unequal": unequal(rank, ranks) if ranks > 1 else None,
    }
