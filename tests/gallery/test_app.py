"""The gallery's server, asked as its page asks it; its pictures against the Python API's."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from genpipe import api
from genpipe.evaluation.drawn import Drawings
from genpipe.gallery.app import make_app
from genpipe.loaded_system import LoadedSystem

if TYPE_CHECKING:
    from conftest import TinyPipeline

PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def system(tiny: TinyPipeline) -> LoadedSystem:
    tiny.run("sample")
    return api.load(tiny.run("system").uri)


@pytest.fixture(scope="module")
def client(system: LoadedSystem) -> Iterator[TestClient]:
    with TestClient(make_app(system, Drawings.of(system.artifact)), base_url="http://127.0.0.1:5001") as client:
        yield client


def url_of(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def images_of(drawn: list[dict[str, Any]]) -> list[np.ndarray]:
    files = [io.BytesIO(base64.b64decode(each["src"].partition(",")[2])) for each in drawn]
    return [np.asarray(Image.open(file)) for file in files]


def test_every_use_draws_what_the_api_draws(client: TestClient, system: LoadedSystem) -> None:
    [picture] = system.sample([PROMPT], seed=5)
    url = url_of(picture)
    asked = {
        "sample": (
            {"prompt": PROMPT, "each": 2, "seed": 3, "steps": 2},
            system.sample([PROMPT], each=2, seed=3, steps=2),
        ),
        "vary": ({"picture": url, "each": 2, "eta": 0.5}, system.vary(picture, each=2, eta=0.5)),
        "redraw": (
            {"picture": url, "prompt": PROMPT, "each": 1, "strength": 0.5},
            system.redraw(picture, PROMPT, strength=0.5),
        ),
        "change": (
            {"picture": url, "before": PROMPT, "prompt": "a large red circle"},
            system.change(picture, before=PROMPT, after="a large red circle"),
        ),
        "blend": (
            {"picture": url, "second": "a large blue bar", "each": 3},
            system.blend(picture, "a large blue bar", count=3),
        ),
    }
    assert client.get("/system").json()["uses"] == list(dict.fromkeys(["sample", "redraw", *asked]))
    for use, (ask, expected) in asked.items():
        answer = client.post("/draw", json={"use": use, **ask})
        assert answer.status_code == 200, (use, answer.text)
        drawn = answer.json()
        assert [each["info"] for each in drawn] == [image.info for image in expected]
        for found, image in zip(images_of(drawn), expected, strict=True):
            assert np.array_equal(found, np.asarray(image)), use


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        ({"use": "sample"}, "prompts: required"),
        ({"use": "vary"}, "picture: choose a picture first"),
        ({"use": "vary", "picture": "https://example.org/a.png"}, "picture: choose a picture first"),
        ({"use": "vary", "picture": "data:image/png;base64,AAAA"}, "picture: not a picture that can be read"),
        ({"use": "sample", "prompt": PROMPT, "each": 1000}, "less than or equal to 16"),
        ({"use": "sample", "prompt": PROMPT, "prompts": "x"}, "prompts"),
    ],
)
def test_what_cannot_be_drawn_is_explained(client: TestClient, ask: dict[str, Any], said: str) -> None:
    answer = client.post("/draw", json=ask)
    assert answer.status_code == 422
    assert said in str(answer.json()["detail"])


def test_pages_of_other_sites_get_no_answer(client: TestClient) -> None:
    assert client.get("/system", headers={"Host": "gallery.example.org"}).status_code == 400
    body = f'{{"use": "sample", "prompt": "{PROMPT}"}}'
    assert client.post("/draw", content=body, headers={"Content-Type": "text/plain"}).status_code == 422
    assert "default-src 'none'" in client.get("/").headers["Content-Security-Policy"]


def test_what_was_drawn_before_is_shown_and_nothing_else(client: TestClient) -> None:
    pictures = client.get("/pictures").json()
    assert pictures
    answer = client.get(f"/pictures/{pictures[-1]['id']}")
    assert Image.open(io.BytesIO(answer.content)).size == (32, 32)
    assert answer.headers["Content-Type"] == "image/png"
    for missing in (f"/pictures/{len(pictures)}", "/pictures/-1", "/pictures/0/neighbors/9"):
        assert client.get(missing).status_code == 404
