"""The library of the simulated device: built once for a source and a torch, then kept."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import filelock
import torch

from fisherlab.problems.files import cache_folder

SOURCE = Path(__file__).with_name("device.cpp")


class NoCompilerError(RuntimeError):
    """This machine cannot build the device: tests on it are skipped."""


def library() -> Path:
    """Return where the library lies; build it first if this source and torch have none."""
    key = hashlib.sha256(f"{torch.__version__} {SOURCE.read_text()}".encode()).hexdigest()
    place = cache_folder() / "simulated_device" / key[:16] / "device.so"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(place.with_suffix(".lock")):  # other workers wait for the first
        if not place.exists():
            _build(place)
    return place


def _build(place: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError(
            "a simulated device needs g++ or clang++, and there is neither"
        )
    home = Path(torch.__file__).parent
    include = [home / "include", home / "include/torch/csrc/api/include"]
    unfinished = place.with_suffix(".unfinished")
    command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", unfinished]
    command += [f"-I{folder}" for folder in include]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    command += [f"-Wl,-rpath,{home / 'lib'}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler} on {SOURCE.name}: {done.stderr[:4000]}")
    unfinished.replace(place)
