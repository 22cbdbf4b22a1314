"""A page behind a login in a browser without a screen."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx


class LoggedIn(BaseHTTPRequestHandler):
    """A proxy on loopback that logs in for a browser, which takes no password from a command line."""

    target: ClassVar[str]
    login: ClassVar[tuple[str, str]]

    def do_GET(self) -> None:
        self._pass_on("GET")

    def do_POST(self) -> None:
        self._pass_on("POST")

    def _pass_on(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        url = f"{self.target}{self.path}"
        answer = httpx.request(method, url, content=body, headers=headers, auth=self.login, timeout=60)
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def logged_in(target: str, login: tuple[str, str]) -> Iterator[str]:
    """A URL on loopback behind which `target` answers as to somebody who has logged in."""
    handler = type("Handler", (LoggedIn,), {"target": target, "login": login})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def screenshot(url: str, picture: Path) -> str:
    """A page as Chromium shows it, as a PNG of 1500 x 1000 pixels; what the page holds by then."""
    options = ["--headless", "--no-sandbox", "--window-size=1500,1000", "--virtual-time-budget=30000"]
    with tempfile.TemporaryDirectory() as profile:
        browser = ["chromium", *options, f"--user-data-dir={profile}", f"--screenshot={picture}", "--dump-dom", url]
        return subprocess.run(browser, check=True, capture_output=True, text=True, timeout=300).stdout
