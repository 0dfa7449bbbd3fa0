"""Make small mistakes in a copy of the package, and see whether the tests see them.

`python -m tests.mutants` tries every mutant of `cases.py` that was not tried on the same
sources before, in a child process that may take so much of the processor, and prints a
table. The checkout is only read: the copy lies in a temporary folder.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.cases import EVERY, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    *("fisherlab", "tests", "notebooks", "docs"),
    *("conftest.py", "pyproject.toml", "README.md"),
)
SECONDS = 300  # of the processor, whatever else the machine does
DONE = 64  # added to pytest's exit code, which an exception of the child is not
VERDICTS = {DONE: "survived", DONE + 1: "caught", -signal.SIGXCPU: "caught (timeout)"}


def digest(mutant: Mutant) -> str:
    """Tell a mutant, its file and its test files from earlier states of them."""
    files = {mutant.file, *(test.partition("::")[0] for test in mutant.tests)}
    texts = [repr(mutant), *((ROOT / name).read_text() for name in sorted(files))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def copied(folder: Path) -> Path:
    """Copy what the tests need."""
    for name in COPIED:
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, folder / name)
    return folder


def tried(mutant: Mutant, copy: Path, log: Path) -> str:
    """Change the copy, run the tests in a child, and change it back."""
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return "stale"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        _forget(path)
        child = multiprocessing.get_context("fork").Process(
            target=_test, args=(copy, mutant.tests, log)
        )
        child.start()
        child.join(20 * SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
        return VERDICTS.get(child.exitcode, f"error {child.exitcode}")
    finally:
        path.write_text(text)
        _forget(path)


def _forget(path: Path) -> None:
    """Drop what Python compiled: it knows a file by its time in seconds and its size."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def _test(copy: Path, tests: tuple[str, ...], log: Path) -> None:
    """Run tests in this child process, on the copy, without the check of types."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("fisherlab", "tests", "conftest"):
            del sys.modules[name]
    os.chdir(copy)
    sys.path = [str(copy), *(p for p in sys.path if p not in ("", str(ROOT)))]
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        import pytest

        chosen = [*tests, "-m", "not slow and not gpu and not browser"]
        chosen.append("--jaxtyping-packages=")
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--tb=short", *chosen])
        sys.stdout.flush()
    os._exit(DONE + int(code))


def warm() -> None:
    """Import what every child needs, so that a child begins at once."""
    import matplotlib.pyplot
    import torch
    import xarray

    torch.set_num_threads(1)
    del matplotlib, xarray


def show(mutant: Mutant, verdict: str, seconds: float) -> None:
    """Print a line of the table."""
    place = mutant.file.removeprefix("fisherlab/")
    note = f"  ({mutant.explained})" if mutant.explained else ""
    print(f"{verdict:<18}{seconds:>6.1f} s  {place:<36}{mutant.name}{note}", flush=True)


def main() -> int:
    """Try the mutants; 1 if one survived that nothing explains."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", help="mutants whose name or file holds this text")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    parser.add_argument("--again", action="store_true", help="try also what was tried")
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "mutants.json")
    options = parser.parse_args()
    wanted = options.only or ""
    chosen = [m for m in EVERY if wanted in m.name or wanted in m.file]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file}: {mutant.name}")
        return 0
    options.store.parent.mkdir(parents=True, exist_ok=True)
    store, failed = options.store, []
    known = json.loads(store.read_text()) if store.exists() else {}
    warm()
    with tempfile.TemporaryDirectory() as scratch:
        copy = copied(Path(scratch))
        for mutant in chosen:
            key, start = digest(mutant), time.monotonic()
            if options.again or key not in known:
                verdict = tried(mutant, copy, Path(scratch, "log.txt"))
                known[key] = [verdict, time.monotonic() - start]
                store.write_text(json.dumps(known))
                if verdict.startswith("error"):
                    print(Path(scratch, "log.txt").read_text()[-2000:])
            show(mutant, *known[key])
            if not known[key][0].startswith("caught") and not mutant.explained:
                failed.append(mutant)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} caught or explained")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
