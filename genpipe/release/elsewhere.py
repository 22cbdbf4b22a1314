"""A release's parts as diffusers and transformers load them, and the whole where they have a pipeline of its kind.

What is written gives there what it gives here. What they have no form for is left out, and the model card says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from genpipe.artifacts import Artifact
from genpipe.data.tokenizer import EOT_ID, CaptionTokenizer
from genpipe.diffusion.process import DiffusionConfig, SamplerConfig
from genpipe.generation.conditions import TOKENIZER_FILE, embed_statistics, latent_statistics
from genpipe.generation.released import PARTS, open_system
from genpipe.models.autoencoder import Autoencoder
from genpipe.models.clip import CLIP
from genpipe.models.dc_autoencoder import DeepCompressionConfig
from genpipe.models.decoder import Decoder
from genpipe.models.interop import autoencoder, clip, prior, schedulers, unet
from genpipe.models.ldm_autoencoder import LdmConfig
from genpipe.models.prior import DiffusionPrior
from genpipe.models.unet import UNetConfig
from genpipe.weights import RECORD_FILE, load_weights

FOLDER = "diffusers"
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
CPU = torch.device("cpu")

Parts = Mapping[str, Artifact]


class Form(NamedTuple):
    """A part in another library: the name of its folder, the library, the config of its class, and its weights."""

    folder: str
    library: str
    config: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def name(self) -> str:
        """The class that loads it."""
        name: str = self.config.get("_class_name") or self.config["architectures"][0]
        return name


def write_elsewhere(folder: Path) -> dict[str, str]:
    """Write `diffusers/` into a release, if there is anything to write: where each part is found, or why it is not."""
    opened, told, forms = open_system(folder), dict[str, str](), dict[str, Form]()
    for role, part in opened.parts.items():
        if part.kind == "text_encoder":
            told[f"{PARTS}/{role}"] = "as it is: the files are transformers' own"
            continue
        try:
            forms[role] = form = _form(role, opened.parts)
        except ValueError as error:
            told[f"{PARTS}/{role}"] = f"not there: {error}"
            continue
        _write(form, folder / FOLDER)
        if part.kind == "clip":
            _write_preparation(part, folder / FOLDER / form.folder)
        told[f"{PARTS}/{role}"] = f"`{FOLDER}/{form.folder}`: {form.library}' {form.name}"
    try:
        told["the whole"] = _write_pipeline(opened.model, opened.parts, forms, folder / FOLDER)
    except ValueError as error:
        told["the whole"] = f"not there: {error}"
    return told


def _form(role: str, parts: Parts) -> Form:
    """A part as another library has it. Raises ValueError, saying why, where none does."""
    writers: dict[str, Callable[[Parts], Form]] = {
        "autoencoder": _autoencoder,
        "clip": _clip,
        "prior": _prior,
        "decoder": _decoder,
    }
    if role not in writers:
        raise ValueError(f"neither library has a network like that of a {parts[role].kind}")
    return writers[role](parts)


def _module(part: Artifact) -> tuple[torch.nn.Module, dict[str, Any], dict[str, int]]:
    """A part's module, what was saved with it, and its sizes."""
    module, extra = load_weights(Path(part.uri), kind=part.kind, device=CPU)
    sizes = json.loads(Path(part.uri, RECORD_FILE).read_text("utf-8"))["sizes"]
    return module, extra, sizes


def _autoencoder(parts: Parts) -> Form:
    """AutoencoderKL of the standardized latents that the decoder draws; the others of latents as they are."""
    model = cast(Autoencoder, _module(parts["autoencoder"])[0])
    cfg = model.cfg
    if not isinstance(cfg, LdmConfig | DeepCompressionConfig):
        raise ValueError(f"diffusers has no autoencoder of kind {cfg.kind}")
    config, state = autoencoder.config_to_diffusers(cfg), autoencoder.to_diffusers(model.state_dict(), cfg)
    if config["_class_name"] == "AutoencoderKL":
        statistics = latent_statistics(parts["decoder"].meta, CPU)
        state = autoencoder.standardizing(state, mean=statistics.mean.flatten(), std=statistics.std.flatten())
        config |= {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0}
        config["sample_size"] = parts["autoencoder"].meta["image_size"]
    return Form("vae", "diffusers", config, state)


def _clip(parts: Parts) -> Form:
    """CLIPModel; its tokens are numbered as `_write_preparation` writes the tokenizer."""
    module, _, sizes = _module(parts["clip"])
    cfg, state = cast(CLIP, module).cfg, module.state_dict()
    if sizes["eot_id"] == EOT_ID:
        state, sizes = clip.special_tokens_last(state, sizes)
    config = {"architectures": ["CLIPModel"], **clip.config_to_transformers(cfg, sizes)}
    return Form("clip", "transformers", config, clip.to_transformers(state, cfg))


def _write_preparation(part: Artifact, folder: Path) -> None:
    """What turns captions into tokens and pictures into pixels for a CLIPModel."""
    module, _, sizes = _module(part)
    tokenizer = CaptionTokenizer.load(Path(part.uri, TOKENIZER_FILE))
    tokenizer.to_transformers(folder, context_length=sizes["context_length"])
    _write_json(folder / "preprocessor_config.json", clip.preprocessor_to_transformers(cast(CLIP, module).cfg))


def _prior(parts: Parts) -> Form:
    """With the statistics of its diffusion, so that what it gives is un-standardized there."""
    module, _, sizes = _module(parts["prior"])
    if not isinstance(module, DiffusionPrior):
        raise ValueError("diffusers has no autoregressive prior")
    config = prior.config_to_diffusers(module.cfg, embed_dim=sizes["embed_dim"], text_width=sizes["text_width"])
    statistics = embed_statistics(parts["clip"].meta, CPU, scale=parts["prior"].meta.get("embed_scale"))
    state = prior.to_diffusers(module.state_dict(), module.cfg, mean=statistics.mean, std=statistics.std)
    return Form("prior", "diffusers", config, state)


def _decoder(parts: Parts) -> Form:
    """The denoiser of a decoder that is told nothing, or the caption's encodings as they are."""
    module, extra, sizes = _module(parts["decoder"])
    model = cast(Decoder, module)
    if not isinstance(model.cfg.denoiser, UNetConfig):
        raise ValueError("diffusers' DiT embeds times at other frequencies than this one was trained with")
    if model.embed_dim or model.classes or model.text_transformer is not None:
        raise ValueError("its conditions (image embedding, class label or text transformer) enter otherwise there")
    channels = sizes["latent_channels"]
    config = unet.config_to_diffusers(
        model.cfg.denoiser,
        in_channels=channels,
        out_channels=DiffusionConfig.model_validate(extra["diffusion"]).channels(channels),
        sample_size=_side(parts),
        context_dim=model.text_width or None,
    )
    return Form("unet", "diffusers", config, unet.to_diffusers(model.denoiser.state_dict(), model.cfg.denoiser))


def _side(parts: Parts) -> int:
    """The side of the grid that the decoder draws."""
    in_pixels = "autoencoder" not in parts["decoder"].meta
    side: int = parts["decoder"].meta["image_size"] if in_pixels else parts["autoencoder"].meta["latent_size"]
    return side


def _write(form: Form, target: Path) -> None:
    folder = target / form.folder
    folder.mkdir(parents=True)
    state = {name: tensor.float().contiguous().clone() for name, tensor in form.state.items()}
    save_file(state, folder / WEIGHTS[form.library], metadata={"format": "pt"})
    _write_json(folder / "config.json", form.config)


def _write_pipeline(model: Mapping[str, Any], parts: Parts, forms: Mapping[str, Form], target: Path) -> str:
    """Write what a whole pipeline needs beside the parts; how it is called. Raises ValueError where none fits."""
    if "upsamplers.0" in parts:
        raise ValueError("diffusers has no pipeline with upsamplers like these")
    if model["kind"] != "pixel":
        raise ValueError("the pipelines of diffusers on latents attend to a caption's padding, or have 1,000 classes")
    if "decoder" not in forms or forms["decoder"].name != "UNet2DModel":
        raise ValueError("the pipelines on pixels of diffusers have a U-Net that is told nothing")
    diffusion = DiffusionConfig.model_validate(_module(parts["decoder"])[1]["diffusion"])
    scheduler = schedulers.to_diffusers(diffusion, SamplerConfig.model_validate(model["decoder"]))
    kind = scheduler.config["_class_name"]
    name = kind.replace("Scheduler", "Pipeline")
    (target / "scheduler").mkdir()
    _write_json(target / "scheduler" / "scheduler_config.json", scheduler.config)
    index = {"_class_name": name, "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", kind]}
    _write_json(target / "model_index.json", index)
    arguments = ", ".join(f"{argument}={value}" for argument, value in scheduler.call.items())
    return f'`{name}.from_pretrained("{FOLDER}")({arguments})`'


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
