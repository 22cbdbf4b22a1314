"""The gallery's server: draws what the page asks for, one request at a time, and shows what was drawn before."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from genpipe.evaluation.drawn import Drawings
from genpipe.gallery.history import behind
from genpipe.loaded_system import LoadedSystem
from genpipe.tracking.progress_pictures import Series

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""Nothing is loaded from elsewhere."""
MAX_EACH = 16
DATA_URL = "data:image/"


class Ask(BaseModel):
    """What is to be drawn. `picture` and `second` are data URLs of images; `second` may be a caption."""

    model_config = ConfigDict(extra="forbid")

    use: Literal["sample", "vary", "redraw", "change", "blend"]
    prompt: str = ""
    label: str = ""
    negative: str = ""
    before: str = ""
    picture: str = ""
    second: str = ""
    each: Annotated[int, Field(ge=1, le=MAX_EACH)] = 4
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0


def make_app(system: LoadedSystem, drawings: Drawings, training: Sequence[Series] = ()) -> FastAPI:
    """The application, for loopback alone: it answers no other host name, so no web page elsewhere reaches it.

    `drawings` are what the system has drawn before, `training` what its parts drew while they were trained.
    """
    app = FastAPI(title="genpipe gallery", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    turn = threading.Lock()

    @app.get("/", response_class=HTMLResponse)
    def page() -> HTMLResponse:
        text = files("genpipe.gallery").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    @app.get("/system")
    def describe() -> dict[str, Any]:
        sampler = system.sampler
        return {
            "uri": system.artifact.uri,
            "size": system.size,
            "uses": uses_of(system),
            "conditioned_on": sorted(system.conditioned_on),
            "classes": list(system.classes),
            "steps": sampler.steps,
            "guidance": sampler.guidance_scale,
            "device": str(system.device),
            "made_from": [asdict(made) for made in behind(system.artifact)],
        }

    @app.get("/pictures")
    def pictures() -> list[dict[str, Any]]:
        return [asdict(drawn) for drawn in drawings.pictures]

    @app.get("/pictures/{number}")
    def picture(number: int) -> Response:
        return _image(drawings.image(_known(number, len(drawings.pictures))))

    @app.get("/pictures/{number}/neighbors/{which}")
    def neighbor(number: int, which: int) -> Response:
        there = drawings.pictures[_known(number, len(drawings.pictures))].neighbors
        data, _ = drawings.training(number, _known(which, len(there)))
        return _image(data)

    @app.get("/training")
    def series() -> list[dict[str, Any]]:
        return [
            {"artifact": each.manifest.artifact.uri, "name": each.name, "samples_seen": list(each.pictures)}
            for each in training
        ]

    @app.get("/training/{number}/{samples_seen}")
    def progress(number: int, samples_seen: int) -> Response:
        pictures = training[_known(number, len(training))].pictures
        if samples_seen not in pictures:
            raise HTTPException(404, f"there is no picture after {samples_seen} samples")
        return _image(pictures[samples_seen]())

    @app.post("/draw")
    def draw(ask: Ask) -> list[dict[str, Any]]:
        with turn:  # one at a time: each has the whole machine
            drawn = _drawn(system, ask)
        return [{"src": _data_url(image), "info": dict(image.info)} for image in drawn]

    @app.exception_handler(ValueError)
    def explain(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    return app


def serve(system: LoadedSystem, drawings: Drawings, training: Sequence[Series], *, port: int) -> None:
    """Serve the page on loopback until interrupted."""
    import uvicorn

    print(f"the gallery is on http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    uvicorn.run(make_app(system, drawings, training), host=HOST, port=port, log_level="warning")


def uses_of(system: LoadedSystem) -> list[str]:
    """What a system can be asked for; some uses are those of unCLIP alone."""
    return ["sample", "redraw", *(["vary", "change", "blend"] if system.kind == "unclip" else [])]


def _drawn(system: LoadedSystem, ask: Ask) -> Sequence[Image.Image]:
    common: dict[str, Any] = {"seed": ask.seed, "steps": ask.steps, "guidance_scale": ask.guidance}
    if ask.use == "sample":
        labels = [ask.label] if ask.label else []
        prompts = [ask.prompt] if ask.prompt else []
        return system.sample(prompts, labels=labels, negative=ask.negative, each=ask.each, **common)
    picture = _picture(ask.picture, "picture")
    if ask.use == "redraw":
        told: dict[str, Any] = {
            "label": ask.label or None,
            "negative": ask.negative,
            "strength": ask.strength,
            "each": ask.each,
        }
        return system.redraw(picture, ask.prompt, **told, **common)
    if ask.use == "vary":
        return system.vary(picture, eta=ask.eta, each=ask.each, **common)
    if ask.use == "change":
        return system.change(picture, before=ask.before, after=ask.prompt, **common)
    second = _picture(ask.second, "second") if ask.second.startswith(DATA_URL) else ask.second
    return system.blend(picture, second, count=max(2, ask.each), **common)


def _picture(url: str, name: str) -> Image.Image:
    """An image from a data URL. Raises ValueError for what is none."""
    if not url.startswith(DATA_URL):
        raise ValueError(f"{name}: choose a picture first")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True)))
        image.load()
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a picture that can be read ({error})") from None
    return image


def _known(number: int, count: int) -> int:
    if not 0 <= number < count:
        raise HTTPException(404, f"there is no picture {number}")
    return number


def _image(data: bytes) -> Response:
    kind = (Image.open(io.BytesIO(data)).format or "png").lower()
    return Response(data, media_type=f"image/{kind}", headers={"X-Content-Type-Options": "nosniff"})


def _data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
