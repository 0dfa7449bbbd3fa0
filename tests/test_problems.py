"""Laws of the problems: their data, their networks, and damaged files."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fisherlab import problems
from fisherlab.errors import DataError
from fisherlab.likelihoods import Bernoulli
from fisherlab.problems.data import small_images
from fisherlab.problems.files import MNIST, DataFile, decode_idx, read_verified
from fisherlab.problems.networks import perceptron
from fisherlab.problems.problem import validation


def data_folder() -> Path:
    folder = Path(os.environ.get("FISHERLAB_DATA", "../shared/data"))
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no MNIST files in {folder}: set FISHERLAB_DATA")
    return folder


def published(content: bytes, name: str = "a.gz") -> DataFile:
    import hashlib

    digest = hashlib.sha256(content).hexdigest()
    return DataFile("mnist", name, digest, "https://example.org")


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def reference_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Interpolate bilinearly between pixel centres, the edge pixels repeated."""
    scale = image.shape[0] / size
    at = np.clip((np.arange(size) + 0.5) * scale - 0.5, 0, image.shape[0] - 1)
    grid = np.arange(image.shape[0])
    rows = np.stack([np.interp(at, grid, column) for column in image.T], axis=1)
    return np.stack([np.interp(at, grid, row) for row in rows])


# --- digits ---------------------------------------------------------------------------


def test_digits_are_scikit_learns_images_resized_by_an_independent_formula():
    from sklearn.datasets import load_digits

    x, y = problems.load("digits").train
    bundled = load_digits()
    kept = [i for i in range(1797) if i % 5 != 4]
    expected = [reference_resize(bundled.images[i] / 16, 16).ravel() for i in kept]
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-12)
    np.testing.assert_array_equal(y.numpy(), bundled.target[kept])


def test_digits_split_keeps_every_image_once():
    problem = problems.load("digits")
    sizes = len(problem.train[0]), len(problem.test[0])
    assert sizes == (1438, 359)
    assert problem.train[0].min() >= 0
    assert problem.train[0].max() <= 1


def test_classifier_is_the_network_of_the_paper():
    model = problems.load("digits").model
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [(20, 256), *[(20, 20)] * 4, (10, 20)]


# --- networks -------------------------------------------------------------------------


def test_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    first = problems.load("digits", seed=3).model.state_dict()
    torch.manual_seed(2)
    again = problems.load("digits", seed=3).model.state_dict()
    other = problems.load("digits", seed=4).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    problems.load("digits", seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_dtype_reaches_data_and_weights():
    problem = problems.load("digits", dtype=torch.float32)
    assert problem.train[0].dtype == torch.float32
    assert {p.dtype for p in problem.model.parameters()} == {torch.float32}


def test_glorot_weights_fill_their_interval():
    layer = perceptron([300, 200], "tanh").fc1
    bound = (6 / 500) ** 0.5
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert layer.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)
    assert not layer.bias.any()


def test_linear_layers_have_no_activation():
    names = [name for name, _ in perceptron([3] * 5, "relu", linear=(2,)).named_children()]
    assert names == ["fc1", "relu1", "fc2", "fc3", "relu3", "fc4"]


# --- names and files ------------------------------------------------------------------


def test_unknown_problem_lists_the_known():
    with pytest.raises(ValueError, match=r"no problem 'digit'.*digits, mnist"):
        problems.load("digit")


@pytest.mark.parametrize("nested", [True, False])
def test_a_file_is_found_in_its_folder_or_beside(tmp_path, nested):
    folder = tmp_path / "mnist" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "a.gz").write_bytes(b"content")
    assert read_verified(published(b"content"), tmp_path) == b"content"


def test_the_environment_names_a_folder(tmp_path, monkeypatch):
    (tmp_path / "a.gz").write_bytes(b"content")
    monkeypatch.setenv("FISHERLAB_DATA", str(tmp_path))
    assert read_verified(published(b"content")) == b"content"


def test_a_named_folder_is_not_replaced_by_another(tmp_path, monkeypatch):
    (tmp_path / "a.gz").write_bytes(b"content")
    monkeypatch.setenv("FISHERLAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"a\.gz is missing.*example\.org/a\.gz"):
        read_verified(published(b"content"), tmp_path / "elsewhere")


@pytest.mark.parametrize("content", [b"conten", b"contemt", b""])
def test_a_damaged_file_is_named_with_its_checksum(tmp_path, content):
    (tmp_path / "a.gz").write_bytes(content)
    file = published(b"content")
    with pytest.raises(DataError, match=file.sha256):
        read_verified(file, tmp_path)


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path):
    (tmp_path / "a.gz").mkdir()
    with pytest.raises(DataError, match="Cannot read"):
        read_verified(published(b""), tmp_path)


def test_idx_returns_what_was_written():
    values = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(decode_idx(idx(values), "a", 3).numpy(), values)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"no gzip", "cannot be unpacked"),
        (idx(np.zeros(30))[:-6], "cannot be unpacked"),
        (idx(np.zeros((2, 2, 2))), "begins with"),
        (gzip.compress(b""), "begins with"),
        (gzip.compress(bytes([0, 0, 8, 1, 0])), "inside its header"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2])), "promises 3"),
    ],
    ids=["no-gzip", "cut", "dims", "empty", "header", "short"],
)
def test_idx_refuses_what_is_not_idx(packed, message):
    with pytest.raises(DataError, match=f"labels.*{message}"):
        decode_idx(packed, "labels", 1)


# --- the real files -------------------------------------------------------------------


@pytest.mark.data
def test_mnist_has_the_published_counts_and_pixel_mean():
    raw = decode_idx(read_verified(MNIST[0], data_folder()), "images", 3)
    assert raw.shape == (60000, 28, 28)
    assert raw.double().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
    (x, y), (x_test, y_test) = small_images(MNIST, data_folder(), torch.float32)
    assert x.shape == (60000, 256)
    assert x_test.shape == (10000, 256)
    assert y.bincount()[:3].tolist() == [5923, 6742, 5958]
    assert y_test.bincount()[:3].tolist() == [980, 1135, 1032]
    assert y[:6].tolist() == [5, 0, 4, 1, 9, 2]


@pytest.mark.data
def test_shrinking_keeps_the_ink_of_an_image():
    folder = data_folder()
    raw = decode_idx(read_verified(MNIST[2], folder), "images", 3).double() / 255
    (_, _), (small, _) = small_images(MNIST, folder, torch.float64)
    np.testing.assert_allclose(small.mean(), raw.mean(), rtol=2e-3)


@pytest.mark.data
def test_fashion_mnist_loads_and_is_balanced():
    problem = problems.load("fashion-mnist", data_folder(), dtype=torch.float32)
    assert problem.train[1].bincount().tolist() == [6000] * 10


@pytest.mark.data
def test_the_autoencoder_reconstructs_its_input():
    problem = problems.load("mnist-autoencoder", data_folder(), dtype=torch.float32)
    x, y = problem.test
    assert x is y
    assert x.shape == (10000, 784)
    assert problem.model(x[:2]).shape == (2, 784)
    assert problem.likelihood.loss(problem.model(x[:2]), y[:2]).shape == (2,)


# --- parts ----------------------------------------------------------------------------


def test_fewer_examples_are_spread_over_the_data():
    whole, part = problems.load("digits"), problems.load("digits", examples=300)
    chosen = [k * 1438 // 300 for k in range(300)]
    assert torch.equal(part.train[0], whole.train[0][chosen])
    assert torch.equal(part.train[1], whole.train[1][chosen])
    assert len(part.test[0]) == 300
    assert len(problems.load("digits", examples=1000).test[0]) == 359


@pytest.mark.parametrize("examples", [0, -1])
def test_no_examples_are_refused(examples):
    with pytest.raises(ValueError, match="a positive number"):
        problems.load("digits", examples=examples)


@pytest.mark.parametrize("same", [False, True])
def test_validation_images_are_those_that_do_not_train(same):
    x = torch.arange(10.0)
    y = x if same else x + 0.5

    def data(data_dir, dtype):
        return (x, y), (torch.empty(0), torch.empty(0))

    (kept, target), (held, held_target) = validation(data, 7, None, torch.float32)
    assert len(kept) == 7
    assert sorted(torch.cat((kept, held)).tolist()) == x.tolist()
    assert held.tolist() != [7.0, 8.0, 9.0]
    assert (target is kept, held_target is held) == (same, same)
    assert torch.equal(target, kept + (0 if same else 0.5))
    again, _ = validation(data, 7, None, torch.float32)
    assert torch.equal(again[0], kept)


def test_moving_a_problem_keeps_targets_that_are_inputs():
    x = torch.zeros(2, 3)
    problem = problems.Problem(
        "a", torch.nn.Linear(3, 3), Bernoulli(), (x, x), (x, x.clone())
    )
    moved = problem.to("cpu")
    assert moved.train[1] is moved.train[0]
    assert moved.test[1] is not moved.test[0]


@pytest.mark.parametrize(
    ("place", "given"),
    [("model", (1, 2)), ("likelihood", (1, 2)), ("train", Bernoulli()), ("test", None)],
)
def test_a_problem_says_which_of_its_parts_is_none(place, given):
    """Parts in another order ended in: cannot unpack non-iterable Categorical object."""
    pair = torch.ones(5, 3), torch.ones(5, 3)
    parts = {"model": torch.nn.Linear(3, 3), "likelihood": Bernoulli()}
    parts |= {"train": pair, "test": pair, place: given}
    ours, checked = f"Problem 'a': {place} is of type .*likelihood", f"parameter '{place}'"
    with pytest.raises(TypeError, match=f"{ours}|{checked}"):
        problems.Problem("a", **parts)


def test_a_problem_of_several_inputs_is_refused_when_it_is_made():
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    problem = problems.Problem("a", torch.nn.Linear(3, 3), Bernoulli(), (x, y), (x, y))
    object.__setattr__(problem, "test", ((x, x), y))  # types are checked at the door here
    with pytest.raises(ValueError, match=r"test has x of type tuple.*NaturalGradient"):
        problem.__post_init__()


@pytest.mark.data
def test_koroko_keeps_50_000_digits_to_train():
    problem = problems.load("mnist-autoencoder-koroko", data_folder(), dtype=torch.float32)
    assert len(problem.train[0]) == 50_000
    assert len(problem.test[0]) == 10_000
    assert problem.train[1] is problem.train[0]


@pytest.mark.data
def test_fashion_mnist_images_fit_the_simple_cnn():
    problem = problems.load(
        "fashion-mnist-cnn", data_folder(), dtype=torch.float32, examples=500
    )
    x, y = problem.train
    assert x.shape == (500, 1, 28, 28)
    assert (x.min(), x.max()) == (0, 1)
    assert x.mean().item() == pytest.approx(0.286, abs=0.02)
    with torch.no_grad():
        loss = problem.likelihood.loss(problem.model(x), y).mean().item()
    assert 2 < loss < 3.5


@pytest.mark.data
def test_the_cifar10_subset_has_the_moments_of_cifar10():
    folder = data_folder()
    problem = problems.load("cifar10-subset-resnet32", folder, dtype=torch.float32)
    x, y = problem.train
    assert x.shape == (2000, 3, 32, 32)
    assert y[:5].tolist() == [6, 9, 9, 4, 1]
    # 59 is the first red value of the first image, 62 its first green one.
    assert x[0, 0, 0, 0].item() == pytest.approx((59 / 255 - 0.4914) / 0.2023, abs=1e-5)
    assert x[0, 1, 0, 0].item() == pytest.approx((62 / 255 - 0.4822) / 0.1994, abs=1e-5)
    assert x.mean((0, 2, 3)).abs().max() < 0.05
    assert 150 < y.bincount().min() < y.bincount().max() < 250
    # Batch norm knows the data: with fresh statistics the loss would be above 100.
    assert not problem.model.training
    with torch.no_grad():
        loss = problem.likelihood.loss(problem.model(x[:200]), y[:200]).mean().item()
    assert 2 < loss < 10


@pytest.mark.parametrize("name", ["digits", "digits-vit", "prose-gpt"])
def test_output_and_labels_fit_together(name):
    problem = problems.load(name, examples=20)
    x, y = problem.test
    with torch.no_grad():
        output = problem.model(x)
    problem.likelihood.check(output, y)
    # Untrained networks guess: the loss per label is near the logarithm of the classes.
    loss = problem.likelihood.loss(output, y).sum() / y.numel()
    assert loss.item() == pytest.approx(np.log(output.shape[-1]), rel=0.25)
