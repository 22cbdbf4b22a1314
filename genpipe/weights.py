"""Weights: trained modules on disk, as safetensors beside a JSON record of how to build them.

A folder of weights holds `weights.safetensors` and `model.json`: the kind of model, its config, the sizes that
the data decided, and what a user of the weights must know (diffusion settings, statistics). Nothing is pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genpipe.config import Config
from genpipe.models.autoencoder import Autoencoder, AutoencoderConfig
from genpipe.models.clip import CLIP, CLIPConfig
from genpipe.models.prior import Prior, PriorConfig
from genpipe.models.unclip import Decoder, DecoderConfig
from genpipe.models.upsampler import Upsampler, UpsamplerConfig

MODELS: dict[str, tuple[type[nn.Module], type[Config]]] = {
    "autoencoder": (Autoencoder, AutoencoderConfig),
    "clip": (CLIP, CLIPConfig),
    "prior": (Prior, PriorConfig),
    "decoder": (Decoder, DecoderConfig),
    "upsampler": (Upsampler, UpsamplerConfig),
}

WEIGHTS_FILE, RECORD_FILE = "weights.safetensors", "model.json"


class Weights(NamedTuple):
    """A module in eval mode, and the `extra` that was saved with it."""

    module: nn.Module
    extra: dict[str, Any]


def save_weights(
    module: nn.Module, folder: Path, *, kind: str, config: Config, sizes: dict[str, int], extra: dict[str, Any]
) -> None:
    """Write `module` (fp32, contiguous) and how to build it; `extra` must be JSON values."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)
    record = {"kind": kind, "config": config.model_dump(mode="json"), "sizes": sizes, "extra": extra}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_weights(folder: Path, *, kind: str, device: torch.device) -> Weights:
    """Build the module that `save_weights` wrote, in eval mode on `device`.

    Raises ValueError if the folder holds another kind of model, or tensors that do not fit its record.
    """
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    if record["kind"] != kind:
        raise ValueError(f"{folder}: holds the weights of a {record['kind']}, not of a {kind}")
    build, config = MODELS[kind]
    with torch.device(device):
        module = build(config.model_validate(record["config"]), **record["sizes"])
    try:
        module.load_state_dict(load_file(folder / WEIGHTS_FILE, device=str(device)))
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: does not fit {RECORD_FILE} beside it: {error}") from error
    return Weights(module.eval().requires_grad_(False), record["extra"])
