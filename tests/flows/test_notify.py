from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from toybox import talking_otherwise

from flows.notify import tell
from flows.reporting import StageResult
from genpipe.stage_config import Gate


class Hook(BaseHTTPRequestHandler):
    told: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    told: list[dict[str, Any]] = []
    server = HTTPServer(("127.0.0.1", 0), type("Hook", (Hook,), {"told": told}))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", told
    server.shutdown()
    server.server_close()


RAN = StageResult("clip", "ran", metrics={"loss": 0.5})
GATED = StageResult("evaluate", "ran", metrics={"recall": 0.4}, gates={"recall": Gate(min=0.6)})
FAILED = StageResult("decoder", "failed", message="no space left")
CACHED = StageResult("shard", "cached")


@pytest.mark.parametrize(
    ("results", "status", "said"),
    [
        ([CACHED, RAN], "finished", "ran clip"),
        ([CACHED], "nothing to do", "every stage is up to date"),
        ([RAN, GATED], "missed a gate", "recall is 0.4"),
        ([RAN, GATED, FAILED], "failed", "decoder: no space left"),
    ],
)
def test_the_outcome_is_told(
    hook: tuple[str, list[dict[str, Any]]], results: list[StageResult], status: str, said: str
) -> None:
    url, told = hook
    tell(url, pipeline="demo", run="demo 2026-01-02", results=results)
    [message] = told
    assert (message["pipeline"], message["run"], message["status"]) == ("demo", "demo 2026-01-02", status)
    assert said in message["text"] and status in message["text"]
    assert message["stages"] == {result.stage: result.status for result in results}


def test_the_url_may_come_from_the_environment(
    hook: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, told = hook
    tell("", pipeline="demo", run="demo", results=[RAN])
    assert told == []
    monkeypatch.setenv("GENPIPE_NOTIFY", url)
    tell("", pipeline="demo", run="demo", results=[RAN])
    assert len(told) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/secret", "not-a-url/secret"])
def test_a_webhook_that_does_not_answer_harms_nothing(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    tell(url, pipeline="demo", run="demo", results=[RAN])
    said = capsys.readouterr().err
    assert "webhook" in said and "secret" not in said


def test_what_speaks_no_http_harms_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with talking_otherwise() as url:
        tell(url, pipeline="demo", run="demo", results=[RAN])
    assert "did not take the message: BadStatusLine" in capsys.readouterr().err
