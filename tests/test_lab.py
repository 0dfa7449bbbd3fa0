"""`fisherlab lab` opens copies: the originals and what the user wrote stay."""

import os
import sys
from pathlib import Path

import pytest

from fisherlab import cli
from fisherlab.cli.commands import copy_notebooks, notebooks

NAMES = sorted(path.name for path in notebooks().glob("*.ipynb"))


@pytest.fixture
def started(monkeypatch):
    """Note the command instead of becoming it."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, words: commands.append(words))
    return commands


def test_copies_are_made_and_jupyterlab_opens_on_them(started, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    words = ["--port", "8899", "--no-browser", "--allow-root"]
    assert cli.main(["lab", str(folder), *words]) == 0
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    (command,) = started
    assert command == [
        *(sys.executable, "-m", "jupyterlab", str(folder)),
        *("--port=8899", "--no-browser", "--allow-root"),
    ]
    assert f"{len(NAMES)} notebooks copied" in capsys.readouterr().out


def test_the_default_folder_is_below_the_working_directory(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lab"]) == 0
    assert started[0][-1] == "fisherlab-notebooks"
    assert Path("fisherlab-notebooks").is_dir()


def test_a_notebook_that_is_there_is_kept(tmp_path):
    (tmp_path / NAMES[0]).write_text("mine")
    copied, kept = copy_notebooks(tmp_path)
    assert [path.name for path in kept] == NAMES[:1]
    assert [path.name for path in copied] == NAMES[1:]
    assert (tmp_path / NAMES[0]).read_text() == "mine"


def test_the_originals_stay_as_they_are(tmp_path):
    before = {path.name: path.read_bytes() for path in notebooks().glob("*.ipynb")}
    copied, _ = copy_notebooks(tmp_path)
    for path in copied:
        path.write_text("changed")
    assert {path.name: path.read_bytes() for path in notebooks().glob("*.ipynb")} == before


def test_a_file_in_the_way_is_named(started, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["lab", str(tmp_path / "file")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert not started


def test_without_jupyterlab_the_remedy_is_told(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["lab", str(tmp_path / "new")]) == 2
    assert "pip install 'fisherlab[lab]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
