"""The simulated device is one: memory of its own, no mixing, views, generators, counts."""

import copy
import io
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from tests import simulated_device
from tests.benchmarks import accelerator
from tests.on_device import transfers

pytestmark = pytest.mark.device


@pytest.fixture(autouse=True)
def _simulated(device):
    if device.type != "sim":
        pytest.skip("of the simulated device alone")


def arange(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


# --- mixing ---

MIXED = {
    "sum": lambda a, b: a + b,
    "sum the other way": lambda a, b: b + a,
    "product": lambda a, b: a @ b,
    "where": lambda a, b: torch.where(a > 1, a, b),
    "cat": lambda a, b: torch.cat([a, b]),
    "numbers stacked": lambda a, b: torch.stack([a[0, 0], b[0, 0]]),
    "in place": lambda a, b: a.add_(b),
    "in place on the host": lambda a, b: b.add_(a),
    "a number into the host": lambda a, b: b[0, 0].add_(a[0, 0]),
    "out": lambda a, b: torch.add(a, a, out=b),
    "solve": torch.linalg.solve,
    "gather": lambda a, b: a.gather(0, b.long()),
    "scatter": lambda a, b: a.scatter(0, b.long() % 3, a),
    "index of the host": lambda a, b: b[a.long()[:, 0] % 3],
    "select": lambda a, b: a.index_select(0, b.long()[0] % 3),
    "a number's select": lambda a, b: a.index_select(0, torch.tensor(1)),
    "linear": nn.functional.linear,
    "convolution": lambda a, b: nn.functional.conv1d(a[None], b[None]),
    "batch norm": lambda a, b: nn.functional.batch_norm(a, b[0], b[1]),
    "embedding": lambda a, b: nn.functional.embedding(b.long() % 3, a),
    "foreach": lambda a, b: torch._foreach_add_([a], [b]),
    "set": lambda a, b: a.set_(b.untyped_storage()),
    "numpy": lambda a, b: a.numpy(),
}


@pytest.mark.parametrize("name", MIXED)
def test_an_operation_that_mixes_host_and_device_raises(name, device):
    host = arange(3, 3) + torch.eye(3)
    with pytest.raises((RuntimeError, TypeError), match=r"device|sim"):
        MIXED[name](host.to(device), host.clone())


def test_numbers_and_indices_of_the_host_go_along(device):
    here = arange(3, 3).to(device)
    assert (here + torch.tensor(1.0)).device == device
    assert torch.equal(here[torch.tensor([2, 0])].cpu(), arange(3, 3)[[2, 0]])
    here[torch.tensor([0])] = torch.tensor(5.0)
    assert here[0].tolist() == [5.0] * 3


# --- views and writes ---

VIEWS = {
    "transpose": lambda t: t.T,
    "slice": lambda t: t[1:, ::2],
    "row": lambda t: t[1],
    "view": lambda t: t.view(2, 6),
    "reshape": lambda t: t.reshape(-1),
    "diagonal": lambda t: t.diagonal(),
    "unfold": lambda t: t.unfold(0, 2, 1),
    "as_strided": lambda t: t.as_strided((2, 2), (3, 1), 1),
    "expand": lambda t: t[:1].expand(4, 3),
    "permute": lambda t: t[None].permute(2, 0, 1),
    "chunk": lambda t: t.chunk(2)[1],
    "split": lambda t: t.split([1, 3])[1],
    "unbind": lambda t: t.unbind(1)[2],
    "detach": lambda t: t.detach(),
    "bytes": lambda t: t.view(torch.int32).view(torch.float32),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_shares_the_memory_and_its_layout_is_that_of_the_host(name, device):
    host = arange(4, 3)
    here = host.to(device)
    ours, theirs = VIEWS[name](here), VIEWS[name](host)
    assert ours.device == device
    assert ours.untyped_storage().data_ptr() == here.untyped_storage().data_ptr()
    layout = (ours.shape, ours.stride(), ours.storage_offset())
    assert layout == (theirs.shape, theirs.stride(), theirs.storage_offset())
    here.mul_(-1)
    host.mul_(-1)
    assert torch.equal(ours.cpu(), theirs)


WRITES = {
    "through a slice": lambda t: t[1:, ::2].mul_(3),
    "through the diagonal": lambda t: t.diagonal().fill_(7),
    "through a transpose": lambda t: t.T.add_(1),
    "an assignment": lambda t: t.__setitem__((slice(1, 3), 0), 9.0),
    "indices": lambda t: t.__setitem__(([0, 1], [1, 2]), 7.0),
    "a mask": lambda t: t.__setitem__(t > 5, 0.0),
    "masked fill": lambda t: t.masked_fill_(t > 3, -1),
    "a copy": lambda t: t[0].copy_(t[1]),
    "index add": lambda t: t.index_add_(0, torch.tensor([0, 0], device=t.device), -t[2:]),
    "scatter": lambda t: t.scatter_(0, (t[:1] * 0).long(), -t[:1]),
    "product": lambda t: torch.addmm(t[:3], t[:3], t[1:], out=t[:3]),
    "foreach": lambda t: torch._foreach_mul_([t[0], t[1]], 5.0),
    "a sort": lambda t: torch.sort(t, 1, out=(t, torch.empty_like(t, dtype=torch.long))),
    "cholesky": lambda t: torch.linalg.cholesky(torch.eye(3, device=t.device), out=t[:3].T),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_in_place_lands(name, device):
    host = arange(4, 3)
    here = host.to(device)
    before, version = here.data_ptr(), here._version
    WRITES[name](here)
    WRITES[name](host)
    assert torch.equal(here.cpu(), host)
    assert here.data_ptr() == before
    assert here._version > version


def test_an_output_grows_and_keeps_its_place_in_views(device):
    out = torch.empty(0, device=device)
    torch.add(torch.ones(3, device=device), 1, out=out)
    assert out.tolist() == [2, 2, 2]
    out.resize_(5)
    assert out[:3].tolist() == [2, 2, 2]
    storage = out.untyped_storage()
    storage.resize_(64)
    assert storage.nbytes() == 64
    assert out[:3].tolist() == [2, 2, 2]


# --- layers, gradients, transforms ---

transformer = partial(nn.TransformerEncoderLayer, batch_first=True)
LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 3, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 2)),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "pooling": (lambda: nn.MaxPool2d(2), (1, 2, 4, 4)),
    "attention": (lambda: transformer(8, 2, 16, 0.0), (2, 3, 8)),
    "lstm": (lambda: nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True), (2, 4, 3)),
    "gru": (lambda: nn.GRU(3, 5, 2, batch_first=True, bidirectional=True), (2, 4, 3)),
    "gru without bias": (lambda: nn.GRU(3, 5, bias=False, batch_first=True), (2, 4, 3)),
    "rnn": (lambda: nn.RNN(3, 5, batch_first=True), (2, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_gradients_are_those_of_the_host(name, device):
    make, shape = LAYERS[name]
    host = make().double()
    here = copy.deepcopy(host).to(device)
    x = torch.randn(shape, dtype=torch.float64)

    def found(module, x):
        x = x.requires_grad_()
        output = module(x)
        output = output[0] if isinstance(output, tuple) else output
        grads = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
        return [output, *grads, *module.buffers()]

    for ours, theirs in zip(found(here, x.to(device)), found(host, x), strict=True):
        assert ours.device == device
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of jvp
def test_function_transforms(device):
    host = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    here = copy.deepcopy(host).to(device)
    x = torch.randn(5, 4, dtype=torch.float64)

    def each(module, x):
        def loss(weights, x):
            return functional_call(module, weights, (x,)).square().sum()

        weights = dict(module.named_parameters())
        return vmap(grad(loss), (None, 0))(weights, x), jacrev(module)(x)

    ours, theirs = each(here, x.to(device)), each(host, x)
    for name in theirs[0]:
        torch.testing.assert_close(ours[0][name].cpu(), theirs[0][name])
    torch.testing.assert_close(ours[1].cpu(), theirs[1])
    direction = torch.ones_like(x)
    ours = jvp(here, (x.to(device),), (direction.to(device),))
    for a, b in zip(ours, jvp(host, (x,), (direction,)), strict=True):
        torch.testing.assert_close(a.cpu(), b)


# --- saving, generators, defaults, memory ---


@pytest.mark.parametrize("place", [None, "cpu", "sim", "sim:0"])
def test_saved_tensors_are_loaded_where_they_are_wanted(place, device):
    held = arange(4, 3).to(device)
    model = nn.Linear(2, 2).to(device)
    file = io.BytesIO()
    torch.save({"all": held, "part": held[1:], "model": model.state_dict()}, file)
    file.seek(0)
    found = torch.load(file, map_location=place)
    assert found["all"].device.type == torch.device(place or device).type
    assert torch.equal(found["part"].cpu(), arange(4, 3)[1:])
    found["all"].mul_(2)
    assert torch.equal(found["part"].cpu(), 2 * arange(4, 3)[1:])
    model.load_state_dict(found["model"])


def test_what_the_host_saved_is_loaded_onto_the_device(device):
    file = io.BytesIO()
    torch.save(arange(3), file)
    file.seek(0)
    found = torch.load(file, map_location=device)
    assert found.device == device
    assert found.tolist() == [0, 1, 2]


def test_copies_and_pickles_stay_on_the_device(device):
    held = arange(3).to(device)
    for found in (copy.deepcopy(held), pickle.loads(pickle.dumps(held)), held.clone()):
        assert found.device == device
        assert found.data_ptr() != held.data_ptr()
        assert torch.equal(found, held)
    assert "sim" in repr(held)


def test_the_device_draws_from_generators_of_its_own(device):
    of_host = torch.get_rng_state()
    first, second = (
        torch.rand(3, generator=torch.Generator(device).manual_seed(3), device=device)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator"):
        torch.rand(3, generator=torch.Generator(), device=device)
    with pytest.raises(RuntimeError, match="uniform_ found sim:0 and cpu"):
        torch.rand(3, generator=torch.Generator(device))
    state = torch.sim.get_rng_state()
    drawn = torch.rand(3, device=device), nn.functional.dropout(first)
    torch.sim.set_rng_state(state)
    again = torch.rand(3, device=device), nn.functional.dropout(first)
    assert all(map(torch.equal, drawn, again))
    with torch.random.fork_rng(devices=[0], device_type="sim"):
        torch.sim.manual_seed(1)
    torch.sim.set_rng_state(state)
    assert torch.equal(torch.randn_like(first), torch.randn_like(first)) is False
    assert torch.equal(of_host, torch.get_rng_state())  # nothing of the host was used up


def test_dropout_keeps_the_mean(device):
    with torch.random.fork_rng(devices=[0], device_type="sim"):
        torch.sim.manual_seed(0)
        kept = nn.functional.dropout(torch.ones(4000, device=device), 0.25)
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert kept.mean().item() == pytest.approx(1, abs=0.04)


def test_the_default_device(device):
    torch.set_default_device(device)
    try:
        made = torch.ones(2), torch.randperm(4), torch.eye(2), torch.tensor(1.0)
        assert all(t.device == device for t in made)
        assert nn.Linear(2, 2).weight.device == device
    finally:
        torch.set_default_device(None)


def test_memory_is_counted_and_ends(device):
    free, whole = torch.accelerator.get_memory_info(0)
    held = torch.ones(1000, dtype=torch.float64, device=device)
    kept = held * 2  # made by a kernel of the host
    assert torch.accelerator.get_memory_info(0) == (free - 16_000, whole)
    del held, kept
    assert torch.accelerator.get_memory_info(0) == (free, whole)
    with simulated_device.capacity(whole - free + 1000):
        with pytest.raises(torch.OutOfMemoryError, match="sim out of memory"):
            torch.ones(1000, device=device)
        with pytest.raises(torch.OutOfMemoryError, match="sim out of memory"):
            torch.ones(200, device=device).expand(100, 200) + 1
    assert torch.accelerator.get_memory_info(0) == (free, whole)


def test_pinned_memory_streams_and_events(device):
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert not torch.ones(3).is_pinned()
    assert torch.equal(pinned.to(device, non_blocking=True).cpu(), torch.ones(3))
    stream, event = torch.Stream(device), torch.Event(device)
    with stream:
        assert torch.accelerator.current_stream() == stream
        event.record(stream)
    with simulated_device.counted() as moves:
        stream.synchronize()
        event.synchronize()
    assert moves.waits == 2
    assert event.query()
    assert torch.accelerator.current_accelerator() == torch.device("sim")


# --- counts ---

COUNTED = {
    "arithmetic": (lambda t: (t @ t).exp().sum(), {}),
    "a view": (lambda t: t[1:].T, {}),
    "a Python number": (lambda t: t * 2 + 1, {}),
    "a number": (lambda t: t.sum().item(), {"scalars": 1}),
    "a question": (lambda t: bool((t > 1).all()), {"scalars": 1}),
    "to the host": (lambda t: t.cpu(), {"to_host": 1, "bytes_to_host": 36}),
    "a list": (lambda t: t.tolist(), {"to_host": 1, "bytes_to_host": 36}),
    "to the device": (
        lambda t: torch.ones(5).to(t.device), {"to_device": 1, "bytes_to_device": 20},
    ),
    "an index": (
        lambda t: t[torch.tensor([1])], {"to_device": 1, "bytes_to_device": 8},
    ),
    "a copy on the device": (lambda t: t.clone().copy_(t.T), {}),
    "a shape of numbers": (lambda t: t.nonzero(), {"waits": 1}),
    "equality": (lambda t: torch.equal(t, t + 1), {"waits": 1}),
    "eigenvalues": (torch.linalg.eigh, {"waits": 1}),
    "cholesky": (torch.linalg.cholesky, {"scalars": 1}),
    "cholesky unlooked": (torch.linalg.cholesky_ex, {}),
    "synchronize": (lambda t: torch.accelerator.synchronize(), {"waits": 1}),
    "from nothing": (lambda t: torch.zeros(3, device=t.device), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_what_moves_or_waits_is_counted(name, device):
    here = torch.eye(3).to(device)
    call, expected = COUNTED[name]
    with simulated_device.counted() as moves:
        call(here)
    assert moves == simulated_device.Moves(**expected), moves.lines
    with simulated_device.counted() as before:
        pass
    here.cpu()
    assert before == simulated_device.Moves()


# --- what is written and rehearsed ---

HERE = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", accelerator.PARTS)
def test_the_run_on_a_card_is_rehearsed(part, tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.accelerator", "--device", "sim"]
    command += ["--tiny", "--out", str(tmp_path / "sim.json"), part]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "sim.json").read_text())["cases"]
    assert rows
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())


@pytest.mark.slow
def test_the_table_of_transfers_is_what_is_counted(device):
    page = (HERE / "docs" / "transfers.md").read_text()
    missing = [line for line in transfers.table(device) if line not in page]
    assert not missing, f"`python -m tests.on_device.transfers` prints {missing}"
