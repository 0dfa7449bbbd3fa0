"""Laws of the loaders: what was written is read, what is damaged is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import sys
import tarfile
from dataclasses import replace

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from fisherlab import cli, problems
from fisherlab.errors import DataError
from fisherlab.problems import data, descriptions, files
from fisherlab.problems.data import decode_batch, images
from fisherlab.problems.descriptions import DESCRIPTIONS
from fisherlab.problems.files import (
    DataFile,
    decode_mat,
    decode_npz,
    decode_pickle,
    members,
    read_verified,
)


def published(content, name, folder="there"):
    digest = hashlib.sha256(content).hexdigest()
    return DataFile(folder, name, digest, "https://example.org")


def place(folder, file, content):
    """Write a file where it is looked for, and return it with its checksum."""
    (folder / file.folder).mkdir(exist_ok=True)
    (folder / file.folder / file.name).write_bytes(content)
    return replace(file, sha256=hashlib.sha256(content).hexdigest())


def one_line(error):
    return "\n" not in str(error.value)


# --- IDX pairs ------------------------------------------------------------------------


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def idx_files(folder, *arrays):
    names = ("images.gz", "labels.gz", "test-images.gz", "test-labels.gz")
    return tuple(
        place(folder, DataFile("set", name, "", ""), idx(values))
        for name, values in zip(names, arrays, strict=True)
    )


def test_idx_images_keep_their_order_and_labels(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (3, 28, 28))
    files = idx_files(tmp_path, x, np.array([4, 0, 9]), x[:2], np.array([1, 2]))
    (train, y), (test, y_test) = images(files, tmp_path, torch.float64)
    np.testing.assert_allclose(train[:, 0].numpy(), x / 255)
    np.testing.assert_allclose(test[:, 0].numpy(), x[:2] / 255)
    assert (y.tolist(), y_test.tolist()) == ([4, 0, 9], [1, 2])


@pytest.mark.parametrize(
    ("sizes", "labels", "message"),
    [
        ((3, 28, 28), [1, 2], r"3 images, but labels\.gz holds 2 labels"),
        ((3, 27, 28), [1, 2, 3], "27 x 28"),
        ((3, 28, 28), [1, 2, 10], "the label 10"),
    ],
    ids=["swapped-labels", "wrong-shape", "wrong-class"],
)
def test_idx_files_that_do_not_fit_together_are_refused(tmp_path, sizes, labels, message):
    x = np.zeros((1, 28, 28))
    files = idx_files(tmp_path, np.zeros(sizes), np.array(labels), x, np.zeros(1))
    with pytest.raises(DataError, match=message) as error:
        images(files, tmp_path, torch.float32)
    assert one_line(error)


def test_label_files_that_were_swapped_are_refused(tmp_path):
    x = np.zeros((2, 28, 28))
    files = idx_files(tmp_path, x, np.array([1, 2]), x, np.array([3, 4]))
    names = [tmp_path / "set" / files[k].name for k in (1, 3)]
    contents = [name.read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        name.write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.gz is not the published file"):
        images(files, tmp_path, torch.float32)


# --- MATLAB ---------------------------------------------------------------------------


def mat(**variables):
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=True)
    return file.getvalue()


def mat73(header=b"", **variables):
    """Write an HDF5 file as MATLAB 7.3 does: the axes backwards, a block before it."""
    file = io.BytesIO()
    with h5py.File(file, "w", userblock_size=512 if header else 0) as store:
        for name, values in variables.items():
            store[name] = np.asarray(values).T
    return header.ljust(512) + file.getvalue()[512:] if header else file.getvalue()


WRITERS = {
    "5": mat,
    "7.3": mat73,
    "7.3-header": lambda **v: mat73(b"MATLAB 7.3 MAT-file", **v),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_mat_returns_what_was_written(write):
    values = np.arange(24.0).reshape(2, 3, 4)
    found = decode_mat(write(a=values, b=values[0]), "f.mat", {"a": 3})
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"], values)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_mat_without_the_variable_is_refused(write):
    with pytest.raises(DataError, match=r"f\.mat has no variable 'a'"):
        decode_mat(write(b=np.ones((2, 2))), "f.mat", {"a": 2})


@pytest.mark.parametrize(
    "content",
    [
        mat(a=np.ones((40, 40)))[:150],
        mat(a=np.random.default_rng(0).random((40, 40)))[:-200],
        mat73(a=np.ones((40, 40)))[:900],
        b"",
        b"no matrix at all" * 40,
    ],
    ids=["cut-header", "cut-5", "cut-7.3", "empty", "text"],
)
def test_a_damaged_mat_is_refused_in_one_line(content):
    with pytest.raises(DataError, match=r"^f\.mat ") as error:
        decode_mat(content, "f.mat", {"a": 2})
    assert one_line(error)


@pytest.mark.parametrize(
    "values", [np.ones((2, 2, 2)), np.array([["a"]]), np.array([[1.0, "b"]], dtype=object)]
)
def test_a_mat_variable_of_another_kind_is_refused(values):
    with pytest.raises(DataError, match=r"numbers with 2 axes|has no variable"):
        decode_mat(mat(a=values), "f.mat", {"a": 2})


def test_a_mat_that_points_to_another_file_is_refused(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as store:
        store["a"] = np.ones((2, 2))
    raw = tmp_path / "raw"
    raw.write_bytes(np.ones(4).tobytes())
    for link in ("external-link", "external-data", "virtual", "soft"):
        file = io.BytesIO()
        with h5py.File(file, "w") as store:
            if link == "external-link":
                store["a"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "a")
            elif link == "external-data":
                store.create_dataset("a", (2, 2), "f8", external=[(str(raw), 0, 32)])
            elif link == "virtual":
                layout = h5py.VirtualLayout((2, 2), "f8")
                layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "a", (2, 2))
                store.create_virtual_dataset("a", layout)
            else:
                store["b"] = np.ones((2, 2))
                store["a"] = h5py.SoftLink("/b")
        with pytest.raises(DataError, match="the file itself"):
            decode_mat(file.getvalue(), "f.mat", {"a": 2})


# --- SVHN, CURVES, FACES --------------------------------------------------------------


def house_numbers(n, seed=0, labels=None):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    chosen = np.arange(1, n + 1) if labels is None else np.asarray(labels)
    return pixels, mat(X=pixels, y=chosen[:, None].astype(np.uint8))


def test_house_numbers_are_read_with_zero_as_class_zero(tmp_path, monkeypatch):
    pixels, content = house_numbers(10)
    files = tuple(place(tmp_path, file, content) for file in data.SVHN)
    monkeypatch.setattr(data, "SVHN", files)
    (x, y), (x_test, _) = data.svhn(tmp_path, torch.float64)
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    mean, scale = np.array([0.4377, 0.4438, 0.4728]), np.array([0.1980, 0.2010, 0.1970])
    expected = (pixels[3, 5, :, 7] / 255 - mean) / scale
    np.testing.assert_allclose(x[7, :, 3, 5].numpy(), expected)
    assert torch.equal(x, x_test)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (house_numbers(2, labels=[1, 2, 3])[1], "2 images, but labels"),
        (house_numbers(2, labels=[1, 11])[1], "labels from 1 to 11"),
        (mat(X=np.zeros((32, 32, 3, 2)), y=np.ones((2, 1))), "float64"),
        (mat(X=np.zeros((28, 32, 3, 2), np.uint8), y=np.ones((2, 1))), "28"),
        (mat(y=np.ones((2, 1))), "no variable 'X'"),
    ],
)
def test_other_house_numbers_are_refused(tmp_path, monkeypatch, content, message):
    files = tuple(place(tmp_path, file, content) for file in data.SVHN)
    monkeypatch.setattr(data, "SVHN", files)
    with pytest.raises(DataError, match=message):
        data.svhn(tmp_path, torch.float64)


def test_the_original_curves_are_read(tmp_path, monkeypatch):
    x = np.random.default_rng(0).random((3, 784))
    content = mat(bdata=x, bdatatest=x[:2], tdata=np.ones((3, 1)))
    monkeypatch.setattr(data, "CURVES", place(tmp_path, data.CURVES, content))
    (train, target), (test, _) = data.curves(tmp_path, torch.float64)
    np.testing.assert_array_equal(train.numpy(), x)
    np.testing.assert_array_equal(test.numpy(), x[:2])
    assert target is train


@pytest.mark.parametrize("x", [np.ones((3, 783)), np.full((3, 784), 1.5)])
def test_other_curves_are_refused(tmp_path, x):
    place(tmp_path, data.CURVES, mat(bdata=x, bdatatest=x))
    with pytest.raises(DataError, match=r"'bdata' of digs3pts_1\.mat"):
        data.curves(tmp_path, torch.float64)


def test_the_original_faces_are_split_by_person(tmp_path):
    columns = np.repeat(np.arange(40.0), 3)[None] * np.ones((625, 1))
    place(tmp_path, data.FACES, mat(newfaces_single=columns))
    (x, _), (x_test, target) = data.faces(tmp_path, torch.float64)
    assert x[:, 0].unique().tolist() == list(range(25))
    assert x_test[:, 9].unique().tolist() == list(range(30, 40))
    assert x.shape == (75, 625)
    assert target is x_test


@pytest.mark.parametrize("shape", [(625, 41), (624, 80), (80, 625)])
def test_other_faces_are_refused(tmp_path, shape):
    place(tmp_path, data.FACES, mat(newfaces_single=np.zeros(shape)))
    with pytest.raises(DataError, match="625 rows"):
        data.faces(tmp_path, torch.float64)


# --- pickles and archives -------------------------------------------------------------


def python2_pickle(data, labels):
    """Write {'data': array, 'labels': list} as Python 2 with numpy 1 did, protocol 2.

    Its strings are bytes without an encoding, which the pickles of Python 3 never hold.
    """

    def text_(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n" + text_(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text_(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    )
    raw = b"T" + struct.pack("<i", data.size) + data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85" + text_(b"b") + b"\x87R"
        b"(K\x01"
        + b"("
        + b"".join(map(number, data.shape))
        + b"t"
        + dtype
        + b"\x89"
        + raw
        + b"tb"
    )
    values = b"](" + b"".join(map(number, labels)) + b"e"
    body = text_(b"data") + array + text_(b"labels") + values
    return b"\x80\x02}(" + body + b"u."


def batch(n=2, key="labels", **changes):
    pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {"data": pixels, key: list(range(n)), **changes}


def test_pickles_of_python_2_are_read():
    content = batch(3)
    pixels, labels = decode_batch(
        python2_pickle(content["data"], [3, 0, 9]), "data_batch_1", "labels", 10
    )
    np.testing.assert_array_equal(pixels.reshape(3, -1), content["data"])
    assert labels.tolist() == [3, 0, 9]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_is_pickled_is_read_or_refused_but_never_run(protocol):
    """Protocol 2 of Python 3 writes bytes through a codec, which no CIFAR file does."""
    content = pickle.dumps(batch(), protocol)
    if protocol == 2:
        with pytest.raises(DataError, match="_codecs"):
            decode_pickle(content, "batch")
    else:
        np.testing.assert_array_equal(decode_pickle(content, "b")["data"], batch()["data"])


class Harmful:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


RAN = []


@pytest.mark.parametrize(
    "call",
    [
        (RAN.append, 1),
        (eval, "RAN.append(1)"),
        (getattr, "", "join"),
        (print, "ran"),
        (np.load, "file"),
        (np.frombuffer, b"1234"),
        (__import__, "antigravity"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_that_a_pickle_names_is_called(call, nested, capsys):
    harmful = Harmful(*call)
    content = {"data": harmful} if nested else harmful
    if nested and call[0] is np.frombuffer:
        content = np.array([harmful], dtype=object)
    with pytest.raises(DataError, match="which is refused") as error:
        decode_pickle(pickle.dumps(content, 4), "data_batch_1")
    assert one_line(error)
    assert not RAN
    assert capsys.readouterr().out == ""
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "content", [b"", b"\x80", pickle.dumps(batch(), 4)[:500], b"Pother\n."]
)
def test_damaged_pickles_are_refused(content):
    with pytest.raises(DataError, match="batch cannot be unpickled") as error:
        decode_pickle(content, "batch")
    assert one_line(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "not a batch"),
        (batch(key="names"), "not a batch with 'data' and 'labels'"),
        (batch(data=[1, 2]), "rows of 3072"),
        (batch(data=np.zeros((2, 1024), np.uint8)), "rows of 3072"),
        (batch(data=np.zeros((2, 3072))), "float64"),
        (batch(labels=[1]), "2 images, but labels"),
        (batch(labels=[1, 10]), "from 1 to 10"),
        (batch(labels=[1, -1]), "from -1 to 1"),
        (batch(labels=["cat", "dog"]), "labels of type"),
    ],
)
def test_pickles_that_are_no_batch_are_refused(content, message):
    with pytest.raises(DataError, match=message):
        decode_batch(pickle.dumps(content, 4), "data_batch_1", "labels", 10)


def archive(files, **changes):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in changes.get(name, {}).items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def cifar10_archive():
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    return archive(
        {
            f"cifar-10-batches-py/{name}": pickle.dumps(batch(k), 4)
            for k, name in enumerate(names, start=1)
        }
    )


def test_cifar10_joins_its_batches_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10", place(tmp_path, data.CIFAR10, cifar10_archive()))
    (x, y), (x_test, _) = data.cifar10(tmp_path, torch.float64)
    assert y.tolist() == [*range(1), *range(2), *range(3), *range(4), *range(5)]
    assert x_test.shape == (6, 3, 32, 32)
    # The first pixel of batch 2 is its red one at the left upper corner.
    pixel = batch(2)["data"][0, [0, 1024, 2048]] / 255
    mean, scale = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
    np.testing.assert_allclose(x[1, :, 0, 0].numpy(), (pixel - mean) / scale)


def test_cifar100_takes_the_fine_labels(tmp_path, monkeypatch):
    parts = {
        f"cifar-100-python/{name}": pickle.dumps(
            batch(2, "fine_labels", fine_labels=[99, 3], coarse_labels=[1, 1]), 4
        )
        for name in ("train", "test")
    }
    file = place(tmp_path, data.CIFAR100, archive(parts))
    monkeypatch.setattr(data, "CIFAR100", file)
    (_, y), _ = data.cifar100(tmp_path, torch.float32)
    assert y.tolist() == [99, 3]


def test_augmented_padding_is_black():
    background = torch.tensor(data.CIFAR10_AUGMENTATION.background, dtype=torch.float64)
    x, _ = data._pair(
        np.zeros((1, 3, 32, 32), np.uint8), np.zeros(1), data._CIFAR10, torch.float64
    )
    torch.testing.assert_close(x[0, :, 0, 0], background)


@pytest.mark.parametrize("name", ["../a", "/a", "b/../../a", "..\\a"])
def test_archives_that_leave_their_folder_are_refused(name):
    content = archive({"wanted": b"1", name: b"2"})
    with pytest.raises(DataError, match="leaves its folder") as error:
        members(content, "a.tar.gz", ["wanted"])
    assert one_line(error)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_archives_with_links_are_refused(kind):
    link = {"wanted": {"type": kind, "linkname": "/etc/passwd"}}
    with pytest.raises(DataError, match="neither file nor folder"):
        members(archive({"wanted": b""}, **link), "a.tar.gz", ["wanted"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "cannot be unpacked"),
        (cifar10_archive()[:9000], "cannot be unpacked"),
        (archive({"other": b""}), "lacks wanted"),
    ],
    ids=["no archive", "cut off", "without the member"],  # gzip writes the time
)
def test_damaged_archives_are_refused(content, message):
    with pytest.raises(DataError, match=message) as error:
        members(content, "a.tar.gz", ["wanted"])
    assert one_line(error)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy():
    file = io.BytesIO()
    np.save(file, np.ones(2))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (npz(y=np.ones(50))[:100], "cannot be read"),
        (npy(), "a single array"),
        (npz(x=np.ones(2)), "lacks y"),
        (npz(y=np.array([Harmful(print, "ran")], dtype=object)), "allow_pickle"),
    ],
    ids=["nothing", "cut off", "one array", "without y", "a pickle"],
)
def test_other_npz_files_are_refused(content, message, capsys):
    with pytest.raises(DataError, match=message) as error:
        decode_npz(content, "a.npz", ["y"])
    assert one_line(error)
    assert capsys.readouterr().out == ""


# --- texts ----------------------------------------------------------------------------


def test_windows_predict_the_next_character():
    (x, y), (x_test, y_test) = data.windows("abcd" * 30, "abcd", 5)
    for inputs, targets in ((x, y), (x_test, y_test)):
        assert torch.equal(targets, (inputs + 1) % 4)
    assert x.shape == (21, 5)
    assert torch.equal(x.flatten(), torch.arange(105) % 4)


@pytest.mark.parametrize(("words", "message"), [("abz" * 9, "'z'"), ("ab", "too short")])
def test_other_texts_are_refused(words, message):
    with pytest.raises(DataError, match=message):
        data.windows(words, "ab", 5)


def test_the_alphabets_hold_every_character_once():
    assert len(set(data.ALPHABET)) == len(data.ALPHABET) == 96
    assert len(set(data.SHAKESPEARE_ALPHABET)) == 65
    assert len(data.SHAKESPEARE_ALPHABET) == 65


# --- missing files and downloads ------------------------------------------------------


@pytest.mark.parametrize("name", [d.name for d in DESCRIPTIONS if d.files])
def test_a_missing_file_is_named_with_checksum_and_address(name, tmp_path):
    file = problems.describe(name).files[0]
    with pytest.raises(DataError) as error:
        problems.load(name, tmp_path)
    message = str(error.value)
    assert one_line(error)
    assert file.name in message
    assert (file.sha256 or "no checksum is published") in message
    assert (file.address or file.origin) in message
    assert str(tmp_path / file.folder) in message


def downloadable(folder, content=b"content", **changes):
    """Return a file whose public address is a folder of this machine."""
    (folder / "public").mkdir()
    (folder / "public" / "a.gz").write_bytes(content)
    file = published(b"content", "a.gz", "set")
    return replace(file, source=(folder / "public").as_uri(), **changes)


@pytest.fixture
def local_fetch(monkeypatch):
    """Let pooch read file: addresses; the network is never used."""
    pooch = pytest.importorskip("pooch")
    calls = []

    def copy(url, output_file, *_):
        calls.append(url)
        assert url.startswith("file://")
        with open(url.removeprefix("file://"), "rb") as file:
            output = file.read()
        with open(output_file, "wb") as file:
            file.write(output)

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *_, **__: copy)
    return calls


@pytest.mark.parametrize("checksum", [True, False])
def test_a_missing_file_is_downloaded_once(tmp_path, local_fetch, checksum):
    file = downloadable(tmp_path)
    file = file if checksum else replace(file, sha256="")
    home = tmp_path / "home"
    for _ in range(2):
        paths = files.fetch([file], home)
        assert paths == [home / "set" / "a.gz"]
        assert read_verified(file, home) == b"content"
    assert len(local_fetch) == 1


def test_a_file_that_is_there_is_verified_and_not_fetched(tmp_path, local_fetch):
    file, home = downloadable(tmp_path), tmp_path / "home"
    home.mkdir()
    (home / "a.gz").write_bytes(b"content")
    assert files.fetch([file], home) == [home / "a.gz"]
    (home / "a.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="not the published file"):
        files.fetch([file], home)
    assert not local_fetch


def test_a_wrong_download_is_refused_and_not_kept(tmp_path, local_fetch):
    file = downloadable(tmp_path, b"something else")
    with pytest.raises(DataError, match="Cannot download") as error:
        files.fetch([file], tmp_path / "home")
    assert one_line(error)
    assert list((tmp_path / "home").rglob("*.gz")) == []


def test_a_lost_connection_is_one_line(tmp_path, local_fetch):
    file = replace(downloadable(tmp_path), name="b.gz")
    with pytest.raises(DataError, match=r"Cannot download .*b\.gz") as error:
        files.fetch([file], tmp_path / "home")
    assert one_line(error)


def test_a_file_without_an_address_cannot_be_downloaded(tmp_path):
    with pytest.raises(DataError, match=r"cifar10_small\.npz cannot be downloaded"):
        problems.download("cifar10-subset-resnet32", tmp_path)


def test_without_pooch_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match=r"pip install 'fisherlab\[data\]'"):
        files.fetch([downloadable(tmp_path)], tmp_path / "home")


def test_the_command_downloads_and_lists(tmp_path, local_fetch, monkeypatch, capsys):
    file = downloadable(tmp_path)
    description = replace(problems.describe("digits"), name="tiny", files=(file,))
    monkeypatch.setattr(descriptions, "_PROBLEMS", {"tiny": description})
    home = str(tmp_path / "home")
    assert cli.main(["problems", "--data-dir", home]) == 0
    assert "set/ (missing)" in capsys.readouterr().out
    assert cli.main(["problems", "--data-dir", home, "--download", "tiny"]) == 0
    assert capsys.readouterr().out.strip() == f"{home}/set/a.gz"
    assert cli.main(["problems", "--data-dir", home]) == 0
    assert "set/ (there)" in capsys.readouterr().out
    assert cli.main(["problems", "--download", "other"]) == 2
    assert "The problems are tiny" in capsys.readouterr().err


def test_addresses_and_checksums_are_well_formed():
    files = {file for d in DESCRIPTIONS for file in d.files}
    for file in files:
        assert file.sha256 == "" or len(bytes.fromhex(file.sha256)) == 32
        assert file.source.startswith("http") or file.origin
