"""Laws of CURVES and FACES drawn anew: their statistics are the published ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

from fisherlab import problems
from fisherlab.problems import data, files
from fisherlab.problems.data import curve_images, curves_surrogate, face_patches
from fisherlab.problems.files import cached


def data_folder():
    folder = Path(os.environ.get("FISHERLAB_DATA", "../shared/data"))
    if not (folder / "olivetti").is_dir():
        pytest.skip(f"no Olivetti photographs in {folder}: set FISHERLAB_DATA")
    return folder


def pca_error(x, x_test, components):
    """Return the mean squared error of test images projected on principal axes."""
    x, x_test = x.double(), x_test.double()
    mean = x.mean(0)
    _, axes = torch.linalg.eigh((x - mean).T @ (x - mean))
    rest = (x_test - mean) @ axes[:, :-components]
    return rest.square().sum(1).mean().item()


# --- CURVES ---------------------------------------------------------------------------


def test_curves_have_the_published_statistics():
    """Entropy just below the best losses (54.9 to 55.3), PCA-18 error 5.90."""
    x, x_test = curve_images(2000), curve_images(400, seed=1)
    entropy = -(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1).mean().item()
    assert entropy == pytest.approx(54.3, abs=0.5)
    assert x.mean().item() == pytest.approx(0.066, abs=0.001)
    assert pca_error(x, x_test, 18) == pytest.approx(5.95, abs=0.25)


def test_the_ink_of_a_curve_follows_its_distance():
    """Against a much finer path of the same control points, drawn one by one."""
    images = curve_images(3, seed=5)
    drawn = torch.rand(
        3, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    ).numpy()
    t = np.linspace(0, 1, 5001)[:, None]
    for image, points in zip(images.view(3, 28, 28).numpy(), drawn, strict=True):
        x = 0.191 + 0.618 * points[:, 0]
        y = 0.191 + 0.206 * (np.arange(3) + 0.5 + 0.9 * (2 * points[:, 1] - 1))
        p = 28 * np.stack((x, y), 1)
        path = (1 - t) ** 2 * p[0] + 2 * t * (1 - t) * p[1] + t**2 * p[2]
        for row in range(28):
            for column in range(0, 28, 3):
                gap = path - (column + 0.5, row + 0.5)
                ink = np.exp(-(gap**2).sum(1).min() / (2 * 1.146**2))
                assert image[row, column] == pytest.approx(ink, abs=0.03)


def test_an_image_depends_on_seed_and_number_only():
    before = torch.get_rng_state()
    few, many = curve_images(3, seed=2), curve_images(260, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(few, many[:3])
    assert not torch.allclose(few, curve_images(3, seed=3))
    assert 0 <= many.min() <= many.max() <= 1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "fisherlab")
    return tmp_path / "fisherlab" / "surrogates"


def test_curves_are_drawn_once(cache, monkeypatch):
    monkeypatch.setattr(data, "_TRAIN", 20)
    monkeypatch.setattr(data, "_TEST", 10)
    (x, y), (x_test, _) = curves_surrogate(None, torch.float64)
    assert x.shape == (20, 784)
    assert x_test.shape == (10, 784)
    assert y is x
    monkeypatch.setattr(data, "curve_images", None)
    (again, _), _ = curves_surrogate(None, torch.float64)
    assert torch.equal(again, x)


def numbers(value=1.0):
    return np.full((2, 3), value, dtype=np.float32)


def test_a_damaged_cache_is_made_anew(cache):
    for content in (b"", b"\x93NUMPY", b"nothing at all"):
        cached("a", (2, 3), numbers)
        (cache / "a.npy").write_bytes(content)
        np.testing.assert_array_equal(cached("a", (2, 3), numbers), numbers())
    other = np.array([print], dtype=object)
    np.save(cache / "a.npy", other, allow_pickle=True)
    np.testing.assert_array_equal(cached("a", (2, 3), numbers), numbers())
    np.save(cache / "a.npy", np.ones(7, np.float32))
    assert cached("a", (2, 3), numbers).shape == (2, 3)
    assert [path.name for path in cache.iterdir()] == ["a.npy"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "file")
    np.testing.assert_array_equal(cached("a", (2, 3), numbers), numbers())


def test_an_interrupted_write_leaves_nothing(cache, monkeypatch):
    def interrupt(file, *_, **__):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached("a", (2, 3), numbers)
    assert list(cache.iterdir()) == []


# --- FACES ----------------------------------------------------------------------------


def test_patches_are_turned_windows_of_the_photograph():
    """Against scipy's rotation and interpolation, for the angles and scales drawn."""
    at = torch.arange(64.0, dtype=torch.float64)
    photo = (at / 9).sin()[:, None] + (at / 13).cos()[None] * 2
    patches = face_patches(photo[None], 4, seed=3).view(4, 25, 25)
    angle, scale = torch.rand(
        2, 1, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).numpy()[:, 0]
    angle, scale = np.pi * (angle - 0.5), 1.4 + 0.4 * scale
    blurred = scipy.ndimage.gaussian_filter(photo.numpy(), 0.55, mode="nearest", radius=2)
    step = np.linspace(-1, 1, 25)
    column, row = np.meshgrid(step, step)
    for patch, turn, size in zip(patches, angle, scale, strict=True):
        half = 24 * 1.6 / size
        x = 31.5 + half * (np.cos(turn) * column - np.sin(turn) * row)
        y = 31.5 + half * (np.sin(turn) * column + np.cos(turn) * row)
        expected = scipy.ndimage.map_coordinates(blurred, [y, x], order=1, mode="nearest")
        np.testing.assert_allclose(patch.numpy(), expected, atol=1e-10)


def test_the_seed_alone_decides_the_patches():
    photos = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    first, again, other = (face_patches(photos, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.data
@pytest.mark.slow
def test_surrogate_faces_have_the_published_statistics():
    """Of 144,900 patches; PCA-30 error of people not seen 135."""
    name = "faces-surrogate-autoencoder"
    problem = problems.load(name, data_folder(), dtype=torch.float32)
    (x, y), (x_test, _) = problem.train, problem.test
    assert x.shape == (103_500, 625)
    assert x_test.shape == (41_400, 625)
    assert y is x
    assert x.mean(0).abs().max() < 1e-4
    assert x.var(0).mean().item() == pytest.approx(1, abs=1e-4)
    assert pca_error(x[::10], x_test[::10], 30) == pytest.approx(135, abs=1.5)


# --- names ----------------------------------------------------------------------------


def test_a_surrogate_says_so_wherever_it_is_named():
    for name in problems.names():
        known = problems.describe(name)
        stands_in = known.data in (curves_surrogate,) or "Olivetti" in str(known.files)
        if "surrogate" in name or stands_in:
            assert "surrogate" in name
            assert known.summary.startswith("SURROGATE of")
    assert len([name for name in problems.names() if "surrogate" in name]) == 6
