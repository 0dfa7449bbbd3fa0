"""A headless Chromium for tests, and what they need to be skipped where there is none.

Driven through chromedriver's own HTTP interface, so that nothing has to be installed
beside the browser of the distribution.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from base64 import b64decode

import pytest

from fisherlab.plots.saving import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
NEEDED = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver"),
]
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "hide-scrollbars")


class Browser:
    """A session of Chromium: go somewhere, run a script, read its logs."""

    def __init__(self, port, profile):
        self.root = f"http://127.0.0.1:{port}"
        arguments = [f"--{flag}" for flag in (*FLAGS, "disable-background-networking")]
        options = {
            "binary": CHROMIUM,
            "args": [*arguments, f"--user-data-dir={profile}"],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            "timeouts": {"script": 150_000},  # a busy machine
        }
        body = {"capabilities": {"alwaysMatch": wanted}}
        self.root += f"/session/{self.ask('/session', body)['sessionId']}"

    def ask(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:  # the reason is in the body
            raise RuntimeError(f"{path}: {error.read().decode()}") from error

    def resize(self, width, height=900):
        screen = {"width": width, "height": height, "mobile": width < 500}
        self.command("Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, **screen)

    def open(self, path, width=1280, height=900):
        self.resize(width, height)
        self.ask("/url", {"url": path if isinstance(path, str) else path.as_uri()})

    def command(self, name, **parameters):
        return self.ask("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script, *arguments):
        return self.ask("/execute/sync", {"script": script, "args": list(arguments)})

    def log(self, kind):
        return self.ask("/se/log", {"type": kind})

    def wait(self, script, *arguments, seconds=300):
        """Wait until a script finds something, and return it."""
        end = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            if time.monotonic() > end:
                raise TimeoutError(script)
            time.sleep(0.2)
        return found

    def click(self, selector):
        """Click where a person would: in the middle of what is seen, scrolled to."""
        (element,) = self.ask(
            "/element", {"using": "css selector", "value": selector}
        ).values()
        self.ask(f"/element/{element}/click", {})

    def picture(self, path):
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(shot["data"]))
        return Image.open(path)

    def close(self):
        self.ask("", method="DELETE")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    port = free_port()
    driver = subprocess.Popen(
        [str(DRIVER), f"--port={port}", "--log-level=OFF"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port)
        session = Browser(port, tmp_path_factory.mktemp("profile"))
        yield session
        session.close()
    finally:
        driver.terminate()
        driver.wait(20)


def free_port():
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, seconds=10):
    """Wait until somebody listens at a port."""
    for _ in range(20 * seconds):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"nothing answers at port {port}")
