"""Published text encoders, T5 and CLIP's, frozen: from captions to the encodings that a denoiser attends to.

They are read from files as transformers writes them, whose content the configuration pins; nothing is fetched from a
hub and nothing is unpickled. transformers is imported here alone, when an encoder is loaded (`pip install
genpipe[text-encoders]`).

Shapes: B captions, L tokens of the longest, W width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt, Tag, TypeAdapter, field_validator
from tokenizers import Tokenizer
from torch import Tensor, nn

from genpipe.config import Config, Location, by_kind
from genpipe.models.precision import fp32

CONFIG, TOKENIZER, INDEX = "config.json", "tokenizer.json", "model.safetensors.index.json"
RECORD = "text_encoder.json"


class _PublishedConfig(Config):
    """Where a text encoder's files are, what they hold, and how it is run."""

    folder: Location = Field(description="path or s3:// URI of a folder with the files, as transformers writes them")
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(
        description="by file name, see `sha256sum FILE`: config.json, tokenizer.json and all .safetensors files"
    )
    width: PositiveInt = Field(description="of its encodings: d_model or hidden_size in its config.json")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of its weights and its arithmetic")

    @field_validator("sha256")
    @classmethod
    def _files_are_complete_and_safe(cls, value: dict[str, str]) -> dict[str, str]:
        if missing := {CONFIG, TOKENIZER} - value.keys():
            raise ValueError(f"{', '.join(sorted(missing))} is not listed; add its digest")
        for name in value:
            if name not in (CONFIG, TOKENIZER, INDEX) and (not name.endswith(".safetensors") or "/" in name):
                raise ValueError(
                    f"{name} is none of {CONFIG}, {TOKENIZER}, {INDEX} and *.safetensors, which are all that is read: "
                    "formats that unpickle may run code; convert the weights with transformers' "
                    "save_pretrained and leave other files out"
                )
        weights = [name for name in value if name.endswith(".safetensors")]
        if not weights:
            raise ValueError("no .safetensors file is listed; add the digests of all that hold the weights")
        if (INDEX in value) != (weights != ["model.safetensors"]):
            raise ValueError(f"weights are one model.safetensors, or several files and {INDEX}; list them all")
        return value


class T5Config(_PublishedConfig):
    """The encoder of T5 (Raffel et al. 2020), as in Imagen (Saharia et al. 2022); its positions have no limit."""

    kind: Literal["t5"]
    context_length: PositiveInt = Field(256, description="tokens of a caption, the end of text included; more are cut")


class ClipTextConfig(_PublishedConfig):
    """The text tower of CLIP (Radford et al. 2021), as in Stable Diffusion 1: the states after the final norm."""

    kind: Literal["clip_text"]
    context_length: int = Field(
        77, ge=3, description="tokens of a caption, start and end of text included; more are cut"
    )


TextEncoderConfig = Annotated[
    Annotated[T5Config, Tag("t5")] | Annotated[ClipTextConfig, Tag("clip_text")], by_kind("t5")
]


class TextEncoder(nn.Module):
    """A published text encoder with its tokenizer, frozen and in eval mode.

    `width` is W; captions are cut to `context_length` tokens, special ones included.
    """

    def __init__(self, network: nn.Module, tokenizer: Tokenizer, *, width: int, context_length: int) -> None:
        """`network` is a T5EncoderModel or CLIPTextModel of transformers."""
        super().__init__()
        self.network = network
        self.width, self.context_length = width, context_length
        tokenizer.no_padding()
        tokenizer.enable_truncation(context_length)
        # A caption that spells a special token is a caption, not a command.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.eval().requires_grad_(False)

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Which of the texts lose tokens to `context_length`."""
        return [bool(encoding.overflowing) for encoding in self._tokenizer.encode_batch(list(texts))]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """text_encodings fp32 [B, L, W], 0 at padding, and text_mask bool [B, L], True at tokens that are not padding.

        Both are on the device of the weights. L is the number of tokens of the longest text, at most `context_length`.
        """
        ids = [torch.tensor(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]
        device = next(self.network.parameters()).device
        lengths = torch.tensor([len(i) for i in ids], device=device)
        ids_BL = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        text_mask = torch.arange(ids_BL.shape[1], device=device) < lengths[:, None]
        with fp32(device):
            states = self.network(input_ids=ids_BL, attention_mask=text_mask.long()).last_hidden_state
        return states.float() * text_mask[..., None], text_mask


def write_record(cfg: T5Config | ClipTextConfig, folder: Path) -> None:
    """Write what `load_text_encoder` must know beside the files of an encoder."""
    (folder / RECORD).write_text(cfg.model_dump_json(indent=1), encoding="utf-8")


def load_text_encoder(folder: Path, *, device: torch.device) -> TextEncoder:
    """The encoder of a local folder with the files that a config lists, of the right digests, and `write_record`'s.

    Raises ValueError where transformers is not installed, or where the files are not those of such an encoder.
    """
    adapter: TypeAdapter[T5Config | ClipTextConfig] = TypeAdapter(TextEncoderConfig)
    cfg = adapter.validate_json((folder / RECORD).read_bytes())
    check_network(folder, cfg)
    network = _read_network(folder, cfg)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    return TextEncoder(network.to(device), tokenizer, width=cfg.width, context_length=cfg.context_length)


def check_network(folder: Path, cfg: T5Config | ClipTextConfig) -> None:
    """Raise ValueError where the config.json in `folder` is of another kind, width or context than `cfg` says."""
    network: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    types = ("t5",) if cfg.kind == "t5" else ("clip", "clip_text_model")
    if network.get("model_type") not in types:
        raise ValueError(
            f"model.kind: {CONFIG} is of a {network.get('model_type')}, but a {cfg.kind} has the model_type "
            f"{' or '.join(types)}; change kind or folder"
        )
    network = network.get("text_config", network)
    if (width := network["d_model" if cfg.kind == "t5" else "hidden_size"]) != cfg.width:
        raise ValueError(f"model.width: {CONFIG} says {width}, not {cfg.width}; set it to {width}")
    if (limit := network.get("max_position_embeddings", cfg.context_length)) < cfg.context_length:
        raise ValueError(
            f"model.context_length: {cfg.context_length} tokens exceed the {limit} positions of {CONFIG}; lower it"
        )


def _read_network(folder: Path, cfg: T5Config | ClipTextConfig) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"a text encoder of kind {cfg.kind} is run by transformers, which is not installed; run "
            "`pip install 'genpipe[text-encoders]'` where the stage runs"
        ) from error
    network: Any = transformers.T5EncoderModel if cfg.kind == "t5" else transformers.CLIPTextModel
    try:
        with _quiet(transformers.utils.logging):
            found, report = network.from_pretrained(
                folder,
                dtype=getattr(torch, cfg.dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder}: not a {cfg.kind} that transformers reads: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder}: the weights of a {cfg.kind} lack {', '.join(missing[:3])}; fetch them again")
    assert isinstance(found, nn.Module)
    return found


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without progress bars, and without a report of the decoder's or the image tower's weights, which are left out."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
