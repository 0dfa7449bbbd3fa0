"""The quick laws of `tests/on_device`, in a process whose torch knows the simulated device.

It is made known once for a process and before anything goes backward, so the other tests
run without it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import simulated_device

HERE = Path(__file__).parent


def test_the_quick_laws_hold_on_the_simulated_device(request):
    try:
        simulated_device.library()
    except simulated_device.NoCompilerError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--jaxtyping-packages="]
    command += ["-m", "device and not slow", "-p", "no:cacheprovider", "on_device"]
    command += ["--device", "sim", "--seed", str(request.config.getoption("seed"))]
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, check=False, cwd=HERE, env=own, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
