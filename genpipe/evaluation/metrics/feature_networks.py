"""Networks whose features metrics compare: their settings are the union `Network`.

B pictures, D features.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, StringConstraints, Tag
from torch import Tensor
from torch.nn import functional as F

from genpipe.artifacts import Artifact, Role, fetch
from genpipe.config import Config, by_kind, canonical_json
from genpipe.data.image_batches import to_uint8
from genpipe.evaluation.metrics.judge import CLIP_ROLE, PREFIX, Judge, check_judge, check_judge_content, judge_roles
from genpipe.evaluation.metrics.metric import Evaluation, check_file
from genpipe.evaluation.networks import INCEPTION_SIZE, inception_features, load_inception
from genpipe.lineage import content_digest
from genpipe.models.clip import CLIP
from genpipe.models.precision import fp32
from genpipe.pinned_files import PinnedFile, read_pinned
from genpipe.weights import load_weights

Encode = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] to features [B, D]."""


class _FileNetwork(PinnedFile):
    """A network that is a file, for pictures of any size."""

    def roles(self) -> dict[str, Role]:
        """None: it is a file."""
        return {}

    def check_inputs(self, inputs: Mapping[str, Artifact], *, setting: str) -> None:
        """Raise ValueError if the file is here and not the one that the settings say."""
        check_file(self, setting=setting)

    def reads_at(self, evaluation: Evaluation) -> int:
        """Pictures are read at their own size."""
        return evaluation.size


class InceptionNetwork(_FileNetwork):
    """FID's Inception (the graph of 2015-12-05) as a TorchScript file: 2048 features.

    Metrics on it have their plain names, `fid_N`, `kid_N`, as they are published.
    """

    kind: Literal["inception"] = "inception"

    @property
    def label(self) -> str:
        """Empty: it is the network that is meant if none is named."""
        return ""

    def load(self, evaluation: Evaluation) -> Encode:
        """The network."""
        network = load_inception(self, device=evaluation.device)
        return lambda images: inception_features(network, images)

    def protocol(self, inputs: Mapping[str, Artifact]) -> dict[str, str]:
        """Its digest, and what is done to pictures before."""
        return {"network": self.sha256, "resize": f"TensorFlow's bilinear, no antialiasing, to {INCEPTION_SIZE}"}


class TorchScriptNetwork(_FileNetwork):
    """Any network as a TorchScript file, such as DINOv2 or the image tower of a published CLIP.

    It takes RGB [B, 3, size, size], `(x - mean) / std` of x in [0, 1], and gives [B, D], or logits [B, K].
    """

    kind: Literal["torchscript"]
    name: Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]*$")] = Field(
        description="as it stands in the names of metrics: frechet_NAME_N"
    )
    size: int = Field(224, ge=1, description="side of the pictures that it takes")
    filter: Literal["bilinear", "bicubic"] = Field("bicubic", description="of the resizing, which is antialiased")
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="of the channels; ImageNet's by default"
    )
    std: tuple[float, float, float] = Field((0.229, 0.224, 0.225), description="of the channels")

    @property
    def label(self) -> str:
        """As it stands in the names of metrics."""
        return self.name

    def load(self, evaluation: Evaluation) -> Encode:
        """The network, with the resizing that it wants before."""
        device = evaluation.device
        network = torch.jit.load(io.BytesIO(read_pinned(self)), map_location=device).eval()
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))

        def encode(images: Tensor) -> Tensor:
            pixels = to_uint8(images).float() / 255
            if pixels.shape[-1] != self.size:
                sides = (self.size, self.size)
                pixels = F.interpolate(pixels, sides, mode=self.filter, antialias=True, align_corners=False).clamp(0, 1)
            with fp32(images.device):
                features: Tensor = network((pixels - mean) / std)
            if features.ndim != 2:
                raise ValueError(
                    f"{self.weights}: gives {tuple(features.shape)}, not [B, D]; export what pools as well"
                )
            return features

        return encode

    def protocol(self, inputs: Mapping[str, Artifact]) -> dict[str, str]:
        """Its digest, and what is done to pictures before."""
        return {"network": self.sha256, "resize": f"{self.filter}, antialiased, to {self.size}"}


class ClipNetwork(Config):
    """The image embeddings, unit vectors, of a CLIP that a pipeline trained: the role `judge`.

    With `judge: self` it is the role `clip`, which may condition the system, and its label is `self_clip`.
    """

    kind: Literal["clip"] = "clip"
    judge: Judge = Field("independent", description="whether the CLIP may be one that conditions the system")

    @property
    def label(self) -> str:
        """`clip`, or `self_clip`."""
        return f"{PREFIX[self.judge]}clip"

    def roles(self) -> dict[str, Role]:
        """The CLIP."""
        return judge_roles(self.judge)

    def check_inputs(self, inputs: Mapping[str, Artifact], *, setting: str) -> None:
        """Raise ValueError if the CLIP may not judge."""
        check_judge(inputs, judge=self.judge, setting=setting)

    def reads_at(self, evaluation: Evaluation) -> int:
        """Pictures are read as CLIP was trained to see them."""
        return int(evaluation.inputs[CLIP_ROLE[self.judge]].meta["clip_image_size"])

    def load(self, evaluation: Evaluation) -> Encode:
        """Its image tower. Raises ValueError if it may not judge."""
        check_judge_content(evaluation.inputs, judge=self.judge, setting="network.judge")
        weights = load_weights(fetch(evaluation.inputs[CLIP_ROLE[self.judge]]), kind="clip", device=evaluation.device)
        return cast(CLIP, weights.module).encode_image

    def protocol(self, inputs: Mapping[str, Artifact]) -> dict[str, str]:
        """Its content, and what is done to pictures before."""
        clip = inputs[CLIP_ROLE[self.judge]]
        return {"network": content_digest(clip), "resize": f"as the shards', to {clip.meta['clip_image_size']}"}


class PixelNetwork(Config):
    """The pictures themselves, shrunk: 3 side^2 features in [-1, 1]. It needs no file, and sees colors and places."""

    kind: Literal["pixels"]
    side: int = Field(16, ge=1, description="in pixels")

    @property
    def label(self) -> str:
        """`pixels`."""
        return "pixels"

    def roles(self) -> dict[str, Role]:
        """None."""
        return {}

    def check_inputs(self, inputs: Mapping[str, Artifact], *, setting: str) -> None:
        """Any pictures can be shrunk."""

    def reads_at(self, evaluation: Evaluation) -> int:
        """Pictures are read small."""
        return self.side

    def load(self, evaluation: Evaluation) -> Encode:
        """Nothing to load."""
        return lambda images: images.flatten(1)

    def protocol(self, inputs: Mapping[str, Artifact]) -> dict[str, str]:
        """That there is no network, and what is done to pictures."""
        return {"network": "none", "resize": f"as the shards', to {self.side}"}


AnyNetwork = InceptionNetwork | TorchScriptNetwork | ClipNetwork | PixelNetwork
Network = Annotated[
    Annotated[InceptionNetwork, Tag("inception")]
    | Annotated[TorchScriptNetwork, Tag("torchscript")]
    | Annotated[ClipNetwork, Tag("clip")]
    | Annotated[PixelNetwork, Tag("pixels")],
    by_kind("inception"),
]


def key_of(network: AnyNetwork) -> str:
    """Names a network's features among those of one evaluation: equal for equal settings, wherever its file lies."""
    settings: dict[str, Any] = network.model_dump(mode="json", exclude={"weights"})
    return f"{network.label or network.kind}-{hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:12]}"


def named(metric: str, network: AnyNetwork) -> str:
    """A metric's name on a network: `kid` on Inception, `kid_dinov2` on another."""
    return f"{metric}_{network.label}" if network.label else metric
