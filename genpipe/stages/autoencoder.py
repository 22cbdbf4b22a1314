"""Train the autoencoder: images to standardizable latents and back (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PlainValidator
from torch import Tensor, nn
from torch.nn import functional as F

from genpipe.artifacts import Artifact, Role
from genpipe.config import Config as Block
from genpipe.data.image_batches import Crop, to_float, to_uint8
from genpipe.data.loader import Data, SampleSet, sample_batches
from genpipe.data.train_sets import check_buckets, check_image_size, image_data
from genpipe.evaluation.grids import hwc, tile
from genpipe.evaluation.networks import load_inception, load_lpips
from genpipe.evaluation.reconstruction import ReconstructionScores
from genpipe.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    FoldedConfig,
    IdentityConfig,
    build_autoencoder,
    kl_divergence,
)
from genpipe.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    logits_right,
)
from genpipe.models.lpips import SMALLEST as SMALLEST_FOR_LPIPS
from genpipe.models.quantizer import codebook_use
from genpipe.pinned_files import PinnedFile
from genpipe.stage_config import StageConfig
from genpipe.training.objective import Batch, Metrics, ObserveTraining, Step, Validation
from genpipe.training.plateau import Plateau, PlateauConfig
from genpipe.training.settings import TrainConfig
from genpipe.training.statistics import Moments
from genpipe.weights import InitialWeights, load_initial_weights, save_weights

VERSION = 1
MAKES = "autoencoder"
HEADLINES = ("psnr",)

PICTURES = 8


def _start(value: Any) -> Any:
    if value == "settled" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("write a number of samples, or `settled`")


class Adversarial(Block):
    """A patch discriminator, joined when the reconstruction has settled (VQGAN; Esser et al. 2021)."""

    start: Annotated[int | Literal["settled"], PlainValidator(_start)] = Field(
        description="samples before the discriminator is trained and used; or `settled`, by the rule below"
    )
    settled: PlateauConfig = PlateauConfig()
    weight: float = Field(0.5, gt=0, description="on top of the adaptive weight")
    model: DiscriminatorConfig = DiscriminatorConfig()


class LpipsConfig(PinnedFile):
    """LPIPS with VGG16 (Zhang et al. 2018), as a loss and as a metric."""

    weight: float = Field(1.0, ge=0, description="against the reconstruction loss; 0: a metric only")


class Config(StageConfig):
    """An autoencoder, the losses that it is trained with, and over how many images its latents are measured."""

    image_size: int = Field(64, ge=8, description="side of the training images, in pixels")
    crop: Crop = Field("center", description="where squares are cut from images that are stored with another shape")
    buckets: bool = Field(
        False, description="train on whole images instead, in batches of one size; of shards with resize.kind buckets"
    )
    model: AutoencoderConfig = Field(FoldedConfig(), description="the network")
    reconstruction: Literal["l1", "l2"] = Field("l1", description="loss on pixel values: absolute or squared error")
    kl_weight: float = Field(1e-6, ge=0, description="on the KL per image, against the L1 loss per pixel value")
    lpips: LpipsConfig | None = None
    adversarial: Adversarial | None = None
    fid: PinnedFile | None = Field(None, description="Inception as TorchScript; adds rFID to what validation reports")
    statistics_samples: int = Field(4096, ge=1, description="images over which the latents' statistics are measured")
    initial: InitialWeights | None = Field(None, description="weights to begin with, of this model; none: random ones")
    train: TrainConfig
    observe: ObserveTraining = ObserveTraining()


def roles(cfg: Config) -> dict[str, Role]:
    """Images: shards, or generated samples."""
    return {"shard": Role("shards", "samples")}


def check_inputs(cfg: Config, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The latents that it promises. Raises ValueError where sizes do not fit one another."""
    check_image_size(inputs["shard"], cfg.image_size, setting="image_size")
    if cfg.buckets:
        check_buckets(inputs["shard"], multiple=cfg.model.factor, setting="buckets")
    if cfg.image_size % cfg.model.factor:
        raise ValueError(f"image_size {cfg.image_size} is not a multiple of the model's factor {cfg.model.factor}")
    if cfg.adversarial and cfg.image_size >> cfg.adversarial.model.layers < 3:
        raise ValueError(f"adversarial.model.layers {cfg.adversarial.model.layers} is too many for images of "
                         f"{cfg.image_size} px; lower it")  # fmt: skip
    if cfg.lpips and cfg.image_size < SMALLEST_FOR_LPIPS:
        raise ValueError(f"lpips needs images of {SMALLEST_FOR_LPIPS} px, image_size is {cfg.image_size}; remove lpips")
    if isinstance(cfg.model, IdentityConfig) and cfg.train.samples:
        raise ValueError(f"model.kind identity has nothing to train; set train.samples to 0, not {cfg.train.samples}")
    return {
        "image_size": cfg.image_size,
        "latent_channels": cfg.model.latent_channels,
        "latent_size": cfg.image_size // cfg.model.factor,
    }


def data(cfg: Config, inputs: Mapping[str, Artifact]) -> Data:
    """Square images of both splits, cropped as configured in training."""
    size = None if cfg.buckets else cfg.image_size
    return image_data(inputs["shard"], size=size, crop=cfg.crop, seed=cfg.train.seed)


def example_batch(cfg: Config, inputs: Mapping[str, Artifact], *, batch_size: int) -> Batch:
    """A batch of zeros as `data` collates them."""
    return {"images": torch.zeros(batch_size, 3, cfg.image_size, cfg.image_size, dtype=torch.uint8)}


def objective(cfg: Config, inputs: Mapping[str, Artifact], device: torch.device) -> Objective:
    """What to train: the autoencoder, and a discriminator where one is configured."""
    return Objective(cfg, device)


class Objective:
    """Reconstruction, perceptual and bottleneck losses, and a hinge GAN with adaptive weight once it has started."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg = cfg
        self.model = build_autoencoder(cfg.model).to(device)
        load_initial_weights(self.model, cfg.initial, kind="autoencoder")
        self.trainable: dict[str, nn.Module] = {"autoencoder": self.model}
        self.plateau: Plateau | None = None
        if cfg.adversarial:
            self.discriminator = Discriminator(cfg.adversarial.model)
            if cfg.adversarial.start == "settled":
                self.plateau = Plateau(cfg.adversarial.settled, batch_size=cfg.train.global_batch_size)
                self.discriminator.register_module("plateau", self.plateau)  # so that checkpoints hold its state
            self.trainable["discriminator"] = self.discriminator.to(device)
        self.lpips = load_lpips(cfg.lpips, device=device) if cfg.lpips else None
        self.inception = load_inception(cfg.fid, device=device) if cfg.fid and device.type != "meta" else None

    def active(self, samples_seen: int) -> Sequence[str]:
        """The autoencoder, and the discriminator once it has started."""
        if self.plateau:
            self.plateau.look(samples_seen)
        return tuple(self.trainable) if self._adversarial(samples_seen) else ("autoencoder",)

    def _adversarial(self, samples_seen: int) -> bool:
        if self.cfg.adversarial is None:
            return False
        start = self.cfg.adversarial.start
        return samples_seen >= start if isinstance(start, int) else self.plateau is not None and self.plateau.reached

    def loss(self, name: str, batch: Batch, step: Step) -> tuple[Tensor, Metrics]:
        """Reconstruction, bottleneck and adversarial losses; of the discriminator its hinge loss (Lim & Ye 2017)."""
        images = to_float(batch["images"])
        if name == "discriminator":
            return self._discriminator_loss(images, step)
        recon, penalty, metrics = self._reconstruct(images, step.generator, learn=True)
        nll, parts = self._distance(recon, images)
        metrics = {**parts, **metrics}
        loss = nll + penalty
        if self.plateau:
            self.plateau.add(nll.detach() * len(images))
        if self.cfg.adversarial and self._adversarial(step.samples_seen):
            adversarial = generator_loss(self.discriminator(recon))
            weight = adaptive_weight(nll, adversarial, last_layer=self.model.last_layer)
            loss = loss + self.cfg.adversarial.weight * weight * adversarial
            metrics |= {"adversarial": adversarial.detach(), "adaptive_weight": weight}
        return loss, metrics

    def _discriminator_loss(self, images: Tensor, step: Step) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            recon, _, _ = self._reconstruct(images, step.generator, learn=False)
        real, fake = self.discriminator(images), self.discriminator(recon)
        real_right, fake_right = logits_right(real, fake)
        return discriminator_loss(real, fake), {"real_right": real_right, "fake_right": fake_right}

    def _distance(self, recon: Tensor, images: Tensor) -> tuple[Tensor, Metrics]:
        """What the reconstruction itself costs, a scalar, and its parts."""
        kind: str = self.cfg.reconstruction
        pixels = F.l1_loss(recon, images) if kind == "l1" else F.mse_loss(recon, images)
        metrics = {kind: pixels.detach()}
        if self.lpips is None or self.cfg.lpips is None or not self.cfg.lpips.weight:
            return pixels, metrics
        perceptual = self.lpips(recon, images).mean()
        return pixels + self.cfg.lpips.weight * perceptual, metrics | {"lpips": perceptual.detach()}

    def _reconstruct(
        self, images: Tensor, generator: torch.Generator, *, learn: bool
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Reconstruction, weighted loss of the bottleneck, and its metrics; `learn`: a codebook notes the latents."""
        mean, logvar = self.model.encode(images)
        if self.model.quantizer is not None:
            quantized = self.model.quantizer(mean, generator=generator if learn else None)
            metrics = {"vq": quantized.loss.detach(), **codebook_use(quantized.counts)}
            return self.model.render(quantized.vectors), quantized.loss, metrics
        if self.cfg.model.bottleneck.kind == "plain":
            return self.model.decode(mean), mean.new_zeros(()), {}
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        kl = kl_divergence(mean, logvar).mean()
        recon = self.model.decode(mean + (0.5 * logvar).exp() * noise)
        return recon, self.cfg.kl_weight * kl, {"kl": kl.detach()}

    def after_step(self) -> None:
        """Move the codebook by what the step noted, and look for the plateau."""
        if self.model.quantizer is not None:
            self.model.quantizer.update()
        if self.plateau:
            self.plateau.update()

    def validate(self, batches: Iterable[Batch], generator: torch.Generator) -> Validation:
        """PSNR, SSIM and, where configured, LPIPS and rFID of held-out images; some beside their originals."""
        scores = ReconstructionScores(lpips=self.lpips, inception=self.inception)
        counts: dict[str, Tensor] = {}
        pictures: dict[str, np.ndarray] = {}
        for batch in batches:
            images = to_float(batch["images"])
            latents, _ = self.model.encode(images)
            recon = self.model.decode(latents, fp32=True)
            scores.add(recon, images)
            if self.model.quantizer is not None:
                for level, count in self.model.quantizer(latents).counts.items():
                    counts[level] = counts[level] + count if level in counts else count
            if not pictures:
                rows = [batch["images"][:PICTURES], to_uint8(recon[:PICTURES])]
                pictures["reconstructions"] = tile([hwc(row) for row in rows], cell=2 * images.shape[-1])
        use = {name: value.item() for name, value in codebook_use(counts).items()}
        return Validation(scores.metrics() | use, pictures)


def export(objective: Objective, cfg: Config, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Write the weights; the meta gets the latents' statistics by channel."""
    model = objective.model.eval()
    save_weights(model, folder, kind="autoencoder", config=cfg.model, sizes={}, extra={})
    if isinstance(cfg.model, IdentityConfig):  # pixels stay in [-1, 1], which samplers may then clip to
        channels = cfg.model.latent_channels
        return {"latent_mean": [0.0] * channels, "latent_std": [1.0] * channels}
    return latent_moments(model, data(cfg, inputs).train, cfg)


def latent_moments(model: Autoencoder, samples: SampleSet, cfg: Config) -> dict[str, list[float]]:
    """`latent_mean` and `latent_std` by channel, over training images that stand for all, taken as training takes them.

    The deviation is that of samples from the posteriors, whether they or their means are trained on (Rombach et al.
    2022, appendix G): the variance of the means and the mean of the variances.
    """
    device = next(model.parameters()).device
    moments = Moments()
    weights = cfg.train.source_weights
    for batch in sample_batches(samples, count=cfg.statistics_samples, batch_size=64, weights=weights, repeat=True):
        mean, logvar = model.encode(to_float(batch["images"].to(device)))
        moments.add(mean, variance=logvar.exp())
    return {"latent_mean": moments.mean(), "latent_std": moments.std()}
