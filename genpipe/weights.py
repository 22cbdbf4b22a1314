"""Weights: trained modules on disk, as safetensors beside a JSON record of how to build them.

A folder of weights holds `weights.safetensors` and `model.json`: the kind of model, its config, the sizes that
the data decided, and what a user of the weights must know (diffusion settings, statistics). Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpipe.config import Config
from genpipe.models.autoencoder import AutoencoderConfig, build_autoencoder
from genpipe.models.clip import CLIP, CLIPConfig
from genpipe.models.decoder import Decoder, DecoderConfig
from genpipe.models.interop import autoencoder, clip, prior, unet
from genpipe.models.prior import DiffusionPriorConfig, PriorConfig, build_prior
from genpipe.models.unet import UNetConfig
from genpipe.models.upsampler import UpsamplerConfig, build_upsampler
from genpipe.pinned_files import PinnedFile, read_pinned

MODELS: dict[str, tuple[Callable[..., nn.Module], Any]] = {
    "autoencoder": (build_autoencoder, AutoencoderConfig),
    "clip": (CLIP, CLIPConfig),
    "prior": (build_prior, PriorConfig),
    "decoder": (Decoder, DecoderConfig),
    "upsampler": (build_upsampler, UpsamplerConfig),
}
"""How to build each kind, and the type of its config: a Config or a union of some."""

WEIGHTS_FILE, RECORD_FILE = "weights.safetensors", "model.json"


RETIRED = frozenset({"checkpoint_blocks"})
"""Settings of models in the records of earlier weights, on which nothing depends any more."""


class Weights(NamedTuple):
    """A module in eval mode, and the `extra` that was saved with it."""

    module: nn.Module
    extra: dict[str, Any]


def save_weights(
    module: nn.Module, folder: Path, *, kind: str, config: Config, sizes: dict[str, int], extra: dict[str, Any]
) -> None:
    """Write `module` (fp32, contiguous) and how to build it; `extra` must be JSON values."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_tensors(state, folder / WEIGHTS_FILE)
    record = {"kind": kind, "config": config.model_dump(mode="json"), "sizes": sizes, "extra": extra}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError where there is no room for it; the library has an error of its own."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {}) or None)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_weights(folder: Path, *, kind: str, device: torch.device) -> Weights:
    """Build the module that `save_weights` wrote, in eval mode on `device`.

    Raises ValueError if the folder holds another kind of model, or tensors that do not fit its record.
    """
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    if record["kind"] != kind:
        raise ValueError(f"{folder}: holds the weights of a {record['kind']}, not of a {kind}")
    build, config = MODELS[kind]
    with torch.device(device):
        module = build(TypeAdapter(config).validate_python(_current(record["config"])), **record["sizes"])
    try:
        module.load_state_dict(load_file(folder / WEIGHTS_FILE, device=str(device)))
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: does not fit {RECORD_FILE} beside it: {error}") from error
    return Weights(module.eval().requires_grad_(False), record["extra"])


def count_parameters(folder: Path) -> int:
    """Numbers in the weights of a folder, from the headers of its files alone."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count


def _current(recorded: Any) -> Any:
    """The config of a record without settings that are no more."""
    if not isinstance(recorded, dict):
        return recorded
    return {key: _current(value) for key, value in recorded.items() if key not in RETIRED}


class InitialWeights(PinnedFile):
    """Weights that a model begins with: our own, or published ones of the same network in another library's names."""

    format: Literal["genpipe", "diffusers", "transformers", "openai"] = Field(
        "genpipe", description="whose names the .safetensors file has; openai: open_clip's too"
    )


FOREIGN: dict[tuple[str, str], tuple[Any, Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]]] = {
    ("autoencoder", "diffusers"): (Config, autoencoder.from_diffusers),
    ("clip", "transformers"): (CLIPConfig, clip.from_transformers),
    ("clip", "openai"): (CLIPConfig, clip.from_openai),
    ("prior", "diffusers"): (DiffusionPriorConfig, prior.from_diffusers),
    ("decoder", "diffusers"): (UNetConfig, unet.from_diffusers),
}
"""By kind and format, which networks are read and how; those of a decoder are its denoiser's alone."""


def load_initial_weights(module: nn.Module, initial: InitialWeights | None, *, kind: str) -> None:
    """Fill a model of `kind` with the weights of a file, if there is one, and on the meta device with nothing.

    Raises ValueError where they are not those of its config.
    """
    if initial is None or any(p.is_meta for p in module.parameters()):
        return
    if not initial.weights.endswith(".safetensors"):
        raise ValueError(f"initial.weights: {initial.weights} is read as .safetensors only; convert it to that")
    network, convert = FOREIGN.get((kind, initial.format), (Config, None))
    if initial.format != "genpipe" and convert is None:
        known = ", ".join(["genpipe", *(form for model, form in FOREIGN if model == kind)])
        raise ValueError(f"initial.format: no {kind} is read from {initial.format}'s names; use one of {known}")
    part: Any = module.denoiser if kind == "decoder" and convert else module
    if convert and not isinstance(part.cfg, network):
        raise ValueError(
            f"initial.format: of a {kind} only the network of {network.__name__} is read from {initial.format}'s "
            f"names, not that of {type(part.cfg).__name__}; change `model`"
        )
    state: dict[str, Tensor] = load_safetensors(read_pinned(initial))
    try:
        state = convert(state, part.cfg) if convert else state
        part.load_state_dict({**(part.state_dict() if kind == "prior" and convert else {}), **state})
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"initial.weights: {initial.weights} does not fit `model`: {error}") from error
