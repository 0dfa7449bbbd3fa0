"""Laws of what is installed: whole without the repository, and typed for its users."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USER = """
from pathlib import Path
import torch
import fisherlab as fl

assert Path(fl.__file__).is_relative_to({target!r}), fl.__file__
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
data = torch.randn(20, 4), torch.randint(0, 2, (20,))
stats = fl.collect(model, data, fl.Categorical())
found = fl.compare(stats, ["kfac", "kpsvd"], damping=fl.RelativeDamping(1.0))
fl.plots.errors(found)
fl.save(found, "errors.nc")
"""
WRONG = """
for draw in (fl.plots.errors, fl.plots.inverse_heatmap, fl.plots.spectra):
    try:
        draw(stats)
    except TypeError as error:
        assert "a Statistics was given. Make one by fl." in str(error)
    else:
        raise AssertionError(draw)
"""
MISTAKES = """
wrong: int = fl.Categorical()
fl.plots.errors(found, axis=None)
fl.KFAC().nothing
"""


def run(*words: str, cwd: Path, target: Path | None = None) -> subprocess.CompletedProcess:
    path = {} if target is None else {"PYTHONPATH": str(target), "MYPYPATH": ""}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, **path},
        capture_output=True,
        text=True,
        check=False,
    )


def done(*words: str, cwd: Path, target: Path | None = None) -> str:
    found = run(*words, cwd=cwd, target=target)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("source")
    done("-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def target(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of the source distribution, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    done("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=source)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_holds_all_of_the_package(source, target):
    kinds = ("*.py", "*.pyi", "py.typed", "*.html", "*.css", "*.js", "*.j2")
    ours = {p.relative_to(ROOT) for kind in kinds for p in (ROOT / "fisherlab").rglob(kind)}
    notebooks = {Path("fisherlab") / p.relative_to(ROOT) for p in ROOT.glob("notebooks/*")}
    assert Path("fisherlab/py.typed") in ours
    assert len(notebooks) >= 4
    assert not [path for path in ours if not (source / path).is_file()]
    assert not [path for path in ours | notebooks if not (target / path).is_file()]


@pytest.mark.slow
def test_it_works_from_an_empty_folder(target, tmp_path):
    done("-c", USER.format(target=str(target)) + WRONG, cwd=tmp_path, target=target)
    assert (tmp_path / "errors.nc").stat().st_size > 5_000
    listed = "from fisherlab import cli; cli.main(['approximators'])"
    assert "kpsvd" in done("-c", listed, cwd=tmp_path, target=target)
    copy = "from fisherlab.cli import commands; commands.copy_notebooks(Path('books'))"
    done("-c", f"from pathlib import Path; {copy}", cwd=tmp_path, target=target)
    assert list(tmp_path.glob("books/01_*.ipynb"))


@pytest.mark.slow
def test_a_users_script_is_checked_by_its_types(target, tmp_path):
    text = USER.format(target=str(target))
    (tmp_path / "right.py").write_text(text)
    (tmp_path / "wrong.py").write_text(text + MISTAKES)
    words = ("-m", "mypy", "--strict", "--no-error-summary")
    done(*words, "right.py", cwd=tmp_path, target=target)
    found = run(*words, "wrong.py", cwd=tmp_path, target=target).stdout
    first = len(text.splitlines()) + 2
    assert [line.split(":")[1] for line in found.splitlines() if ": error:" in line] == [
        str(first + k) for k in range(3)
    ]
