"""A real browser for pages: headless Chromium, where the machine has one."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from toybox import free_port, wait_for
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A headless Chromium at one page, driven by its DevTools protocol."""

    def __init__(self, url: str, profile: Path) -> None:
        port = free_port()
        options = ["--headless", "--no-sandbox", f"--remote-debugging-port={port}", f"--user-data-dir={profile}"]
        assert CHROMIUM is not None
        self.process = subprocess.Popen([CHROMIUM, *options, url], stderr=subprocess.DEVNULL)

        def pages() -> list[dict[str, Any]]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                    return [each for each in json.load(answer) if each["type"] == "page"]
            except OSError:
                return []

        self.socket = connect(wait_for(pages, seconds=120)[0]["webSocketDebuggerUrl"], max_size=None)
        self.calls = 0

    def run(self, script: str) -> Any:
        """What an expression comes to."""
        result = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _call(self, method: str, **told: Any) -> dict[str, Any]:
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": told}))
        while (answer := json.loads(self.socket.recv(timeout=60))).get("id") != self.calls:
            pass
        result: dict[str, Any] = answer["result"]
        return result

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()
