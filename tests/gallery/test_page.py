"""The gallery's page in a real browser, at a real server: a prompt is typed, a picture is drawn, and varied."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import CHROMIUM, Browser
from toybox import free_port, wait_for

if TYPE_CHECKING:
    from conftest import TinyPipeline

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


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
    assert wait_for(lambda: browser.run("results.querySelector('img').naturalWidth")) == 32  # decoded beside the script
    browser.run("results.querySelector('img').click(); dialog.querySelector('[data-act=use]').click()")
    wait_for(lambda: browser.run("!dialog.open && form.use.value") == "vary")
    browser.run("form.requestSubmit()")
    wait_for(lambda: browser.run("results.textContent").startswith("variations"))
    assert browser.run("document.querySelector('#error').textContent") == ""


def test_a_part_is_seen_as_it_learned(browser: Browser) -> None:
    """Moving the slider shows the picture of that moment; a picture leads to the part that drew it."""
    assert browser.run("!document.querySelector('#learning').hidden")
    progress = "document.querySelector('#progress')"
    shown = f"({progress}.complete && {progress}.naturalWidth > 0) ? {progress}.src : ''"
    last = wait_for(lambda: browser.run(shown))
    browser.run("document.querySelector('#moment').value = 0; document.querySelector('#moment').oninput()")
    first = wait_for(lambda: (now := browser.run(shown)) != last and now)
    steps = browser.run("training[0].samples_seen")
    assert (first.rpartition("/")[2], last.rpartition("/")[2]) == (str(steps[0]), str(steps[-1]))
    assert browser.run("document.querySelector('#seen').textContent") == f"{steps[0]:,}"
    browser.run("document.querySelector('#drawn img').click()")
    rows = "[...document.querySelectorAll('#made tr')]"
    [decoder] = [row for row in browser.run(f"{rows}.map(each => each.textContent)") if row.startswith("decoder")]
    assert "/artifacts/decoder/" in decoder and "run " in decoder
    browser.run(f"{rows}.find(each => each.textContent.startsWith('decoder')).querySelector('button').click()")
    wait_for(lambda: not browser.run("dialog.open"))
    assert browser.run("document.querySelector('#series').selectedOptions[0].textContent") == "decoder: samples"


def test_a_refusal_is_shown_and_captions_are_text(browser: Browser) -> None:
    browser.run("form.requestSubmit()")
    wait_for(lambda: "prompts: required" in browser.run("document.querySelector('#error').textContent"))
    browser.run("pictures = [{...pictures[0], caption: '<b id=planted>x</b>'}]; list()")
    assert browser.run("document.querySelector('#drawn figcaption').textContent") == "<b id=planted>x</b>"
    assert browser.run("document.querySelector('#planted')") is None
