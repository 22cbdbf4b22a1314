"""MLflow's page in a real browser, at the address that `genpipe ui` tells."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml
from browser import CHROMIUM, Browser
from conftest import Command
from toybox import free_port, survivors, wait_for

from genpipe.pipeline.spec import sqlite_uri
from genpipe.tracking import store

PAGE = "document.body && document.body.innerText || ''"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_address_opens_the_runs(tmp_path: Path, genpipe: Command) -> None:
    """The pipeline's runs, with the pages for model training beside them, and not those for agents."""
    config, uri = tmp_path / "toy.yaml", sqlite_uri(tmp_path / "store" / "mlflow.db")
    stages = {"shard": {"source": {"kind": "folder", "path": "pictures"}, "image_size": 32}}
    config.write_text(yaml.safe_dump({"name": "toys", "store": str(tmp_path / "store"), "stages": stages}))
    store.check(uri)
    client = store.client_of(uri)
    client.create_run(store.experiment_id_of(client, uri, "other"))
    run = client.create_run(store.experiment_id_of(client, uri, "toys"), run_name="the first of them")
    client.set_tag(run.info.run_id, "mlflow.note.content", "what it was made for")

    port = free_port()
    command = [sys.executable, "-m", "genpipe.cli.main", "ui", str(config), "--port", str(port)]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        said = re.fullmatch(r"MLflow is on (http://\S+) \(Ctrl-C ends it\)\n", served.stdout.readline())
        assert said
        with closing(Browser(said[1], tmp_path / "chromium")) as browser:
            wait_for(lambda: "the first of them" in browser.run(PAGE))
            assert {"Runs", "Models"} <= set(browser.run(PAGE).split("\n"))
            assert "Sessions" not in browser.run(PAGE)
            root, page = f"http://127.0.0.1:{port}/", store.page_of(run.info.experiment_id, run.info.run_id)
            browser.call("Page.navigate", url=root + page)
            wait_for(lambda: "what it was made for" in browser.run(PAGE))
            assert {"Runs", "Models"} <= set(browser.run(PAGE).split("\n"))
            assert "Sessions" not in browser.run(PAGE)
        server = f"tracking.uri=http://127.0.0.1:{port}"
        code, _, error = genpipe("ui", str(config), "--port", str(port))
        assert (code, f"{port}: Address already in use; name another" in error) == (2, True), error
        assert genpipe("ui", str(config), server) == (0, f"the runs are at {said[1]}\n", "")
        started = psutil.Process(served.pid).children(recursive=True)
    finally:
        served.kill()
        served.wait()
    assert started and not survivors(started), "the server ends with the command, whatever ended it"
