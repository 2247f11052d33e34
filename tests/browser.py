"""A headless Chromium, spoken to by its DevTools protocol: what a page shows, says in its console and asks of the network."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = (
    "--headless",
    "--no-sandbox",  # as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Tab:
    """One tab. requests: URLs it asked for; complaints: errors and warnings of its console, and uncaught exceptions."""

    connection: ClientConnection
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    number: int = 0

    def call(self, method: str, **parameters: Any) -> Any:
        """One command, and its answer; what else comes meanwhile is noted."""
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.connection.recv(timeout=30))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, said = message.get("method", ""), message.get("params", {})
        self.events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(said["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.complaints.append(said["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(said["args"]))

    def show(self, page: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Load a file as a screen of this size shows it."""
        self.requests.clear()
        self.complaints.clear()
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self.events:
            self._note(json.loads(self.connection.recv(timeout=30)))

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, to: Path, *, whole: bool = True) -> None:
        """A PNG of the page, all of it or what the screen shows."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        to.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """A browser with a fresh profile in `folder`, ended with the context.

    Raises:
        AssertionError: there is none, or it does not come up in half a minute.
    """
    path = find_browser()
    assert path, "no Chromium or Chrome on the PATH"
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    process = subprocess.Popen(
        [path, *QUIET, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=kept | {"HOME": str(folder)},
        start_new_session=True,
    )
    try:
        with connect(_tab_of(folder, process), max_size=None) as connection:
            tab = Tab(connection)
            for domain in ("Page", "Network", "Runtime", "Log"):
                tab.call(f"{domain}.enable")
            yield tab
            with contextlib.suppress(Exception):
                tab.call("Browser.close")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tab_of(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """The WebSocket of a tab: Chromium writes where it listens into its profile, and tells there which tabs it has."""
    said = folder / "DevToolsActivePort"
    deadline = time.monotonic() + 30
    while not (said.exists() and len(said.read_text().split()) == 2):
        assert process.poll() is None, "the browser ended at once"
        assert time.monotonic() < deadline, "the browser did not come up"
        time.sleep(0.05)
    port, path = said.read_text().split()
    with connect(f"ws://127.0.0.1:{port}{path}") as whole:
        targets = Tab(whole).call("Target.getTargets")["targetInfos"]
    page = next(t for t in targets if t["type"] == "page")
    return f"ws://127.0.0.1:{port}/devtools/page/{page['targetId']}"
