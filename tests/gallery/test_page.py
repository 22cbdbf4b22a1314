"""The gallery's page in a real browser, at a real server: a prompt is typed, a picture is drawn, and varied."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from toybox import free_port, wait_for
from websockets.sync.client import connect

if TYPE_CHECKING:
    from conftest import TinyPipeline

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


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
        self.calls += 1
        told = {"expression": script, "awaitPromise": True, "returnByValue": True}
        self.socket.send(json.dumps({"id": self.calls, "method": "Runtime.evaluate", "params": told}))
        while (answer := json.loads(self.socket.recv(timeout=60))).get("id") != self.calls:
            pass
        assert "exceptionDetails" not in answer["result"], answer["result"]
        return answer["result"]["result"].get("value")

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def browser(tiny: TinyPipeline, tmp_path: Path) -> Iterator[Browser]:
    tiny.run("sample")
    port = free_port()
    command = [sys.executable, "-m", "genpipe.cli.main", "gallery", tiny.run("system").uri, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        browser = Browser(f"http://127.0.0.1:{port}/", tmp_path / "profile")
        try:
            wait_for(lambda: browser.run("document.body && document.body.dataset.ready") == "yes")
            yield browser
        finally:
            browser.close()
    finally:
        server.kill()
        server.wait()


def test_a_prompt_is_drawn_and_varied(browser: Browser) -> None:
    assert browser.run("document.querySelectorAll('#drawn img').length") > 0
    browser.run("form.prompt.value = 'a small red circle'; form.each.value = 2; form.requestSubmit()")
    wait_for(lambda: browser.run("results.children.length") == 2)
    assert browser.run("results.querySelector('img').naturalWidth") == 32
    browser.run("results.querySelector('img').click(); dialog.querySelector('[data-act=use]').click()")
    wait_for(lambda: browser.run("!dialog.open && form.use.value") == "vary")
    browser.run("form.requestSubmit()")
    wait_for(lambda: browser.run("results.textContent").startswith("variations"))
    assert browser.run("document.querySelector('#error').textContent") == ""


def test_a_refusal_is_shown_and_captions_are_text(browser: Browser) -> None:
    browser.run("form.requestSubmit()")
    wait_for(lambda: "prompts: required" in browser.run("document.querySelector('#error').textContent"))
    browser.run("pictures = [{...pictures[0], caption: '<b id=planted>x</b>'}]; list()")
    assert browser.run("document.querySelector('#drawn figcaption').textContent") == "<b id=planted>x</b>"
    assert browser.run("document.querySelector('#planted')") is None
