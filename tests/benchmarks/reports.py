"""The report of every problem, each in a process of its own with its time and memory.

Where the files of a problem are missing, random data of the same shape take their place.
`python -m tests.benchmarks.reports digits mnist`, or `python -m tests.benchmarks reports`;
the pages stay where FISHERLAB_PAGES names a folder.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fisherlab as fl
from fisherlab.errors import DataError
from fisherlab.problems import descriptions

SECONDS, BYTES = 300, 6 * 2**30
COUNT = 600  # random examples of a data set whose files are missing
COLOUR = (3, 32, 32), 10
CLASSES = {  # shape of an image, and classes, by the beginning of the name
    "cifar100": ((3, 32, 32), 100),
    "cifar10": COLOUR,
    "svhn": COLOUR,
    "fashion-mnist-cnn": ((1, 28, 28), 10),
    "fashion-mnist": ((256,), 10),
    "mnist": ((256,), 10),
}
PIXELS = {"faces": 625, "curves": 784, "mnist": 784}


def random_data(name: str, dtype: torch.dtype) -> tuple[object, object]:
    """Return a training and a test pair of the shapes of a problem."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn: Any = {"generator": generator, "device": "cpu"}
    autoencoder = "autoencoder" in name
    known = next((n for n in CLASSES if name.startswith(n)), None)
    if autoencoder:
        x = torch.rand(COUNT, PIXELS[name.partition("-")[0]], dtype=dtype, **drawn)
        y = x
    elif known is not None:
        shape, classes = CLASSES[known]
        x = torch.rand(COUNT, *shape, dtype=dtype, **drawn)
        y = torch.randint(0, classes, (COUNT,), **drawn)
    else:
        model = descriptions.describe(name).build(seed=0, dtype=dtype)
        length = dict(model.named_parameters())["position"].shape[0]
        letters = torch.randint(0, 60, (COUNT, length + 1), **drawn)
        x, y = letters[:, :-1], letters[:, 1:]
    return (x, y), (x[:100], y[:100])


def stand_in(name: str) -> bool:
    """Put random data in the place of missing files; say whether it was needed."""
    description = descriptions.describe(name)
    try:
        description.data(None, torch.float64)
    except DataError:
        made = replace(description, data=lambda _, dtype: random_data(name, dtype))
        descriptions._PROBLEMS[name] = made
        return True
    return False


def child(name: str, examples: int, checkpoints: str) -> None:
    """Write one report and print what it took as JSON."""
    from fisherlab.cli import main

    random = stand_in(name)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = f"report --problem {name} --steps 5 --examples {examples} --quiet"
        words += f" --checkpoints {checkpoints} --out {folder}/out"
        code = main(words.split())
        page = Path(folder, "out", "report.html")
        size = page.stat().st_size if page.exists() else 0
        if size and (kept := os.environ.get("FISHERLAB_PAGES")):
            Path(kept).mkdir(parents=True, exist_ok=True)
            shutil.copy(page, Path(kept, f"{name}.html"))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "problem": name,
                "random_data": random,
                "code": code,
                "seconds": round(time.perf_counter() - started, 1),
                "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
                "peak_bytes": used.ru_maxrss * 1024,
                "page_bytes": size,
            }
        )
    )


def measure(name: str, examples: int = 256, checkpoints: str = "0,1,2,5") -> dict:
    """Return what one report took, or its last line on stderr."""
    words = [sys.executable, "-m", "tests.benchmarks.reports", "--child", name]
    done = subprocess.run(
        [*words, str(examples), checkpoints],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "2"} | os.environ,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return {"problem": name, "code": done.returncode, "error": last}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    last = done.stderr.strip().splitlines()[-1:]
    return found | ({"error": last} if found["code"] else {})


def table(rounds: int, names: tuple[str, ...] = ()) -> dict[str, object]:
    """Return the row of results of `python -m tests.benchmarks reports`."""
    del rounds  # a report is measured once
    found = [measure(name) for name in names or fl.problems.names()]
    targets = {}
    for one in found:
        name = str(one["problem"])
        for key, aim in (("seconds", SECONDS), ("peak_bytes", BYTES)):
            value = one.get(key, float("inf"))
            met = value <= aim and not one["code"]
            targets[f"{name} {key}"] = {"measured": value, "aim": aim, "met": met}
    return {
        "case": "reports",
        "note": "256 examples, 4 moments, default methods, 2 threads",
        "seconds": {str(one["problem"]): one.get("seconds", 0.0) for one in found},
        "times_ours": {},
        "reports": found,
        "targets": targets,
    }


TABLES = {"reports": table}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        for chosen in sys.argv[1:] or fl.problems.names():
            print(json.dumps(measure(chosen)), flush=True)
