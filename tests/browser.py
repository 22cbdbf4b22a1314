"""A headless Chromium at one page, driven by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from toybox import free_port, wait_for
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTH, HEIGHT = 1500, 1000


class Browser:
    """A browser with a profile of its own in a folder; `headers` go with every request, such as a login."""

    def __init__(self, url: str, profile: Path, *, headers: Mapping[str, str] | None = None) -> None:
        port = free_port()
        options = ["--headless", "--no-sandbox", f"--remote-debugging-port={port}", f"--user-data-dir={profile}"]
        assert CHROMIUM is not None
        command = [CHROMIUM, *options, f"--window-size={WIDTH},{HEIGHT}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

        def pages() -> list[dict[str, Any]]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                    return [each for each in json.load(answer) if each["type"] == "page"]
            except (OSError, HTTPException):
                return []

        self.socket = connect(wait_for(pages)[0]["webSocketDebuggerUrl"], max_size=None)
        self.calls = 0
        self.call("Network.enable")
        self.call("Network.setExtraHTTPHeaders", headers=dict(headers or {}))
        self.call("Page.navigate", url=url)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a method of the protocol answers."""
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv(timeout=60))).get("id") != self.calls:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def run(self, script: str) -> Any:
        """What an expression comes to."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self) -> bytes:
        """The page as it looks now, a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End it."""
        self.socket.close()
        self.process.kill()
        self.process.wait()
