"""From captions to image embeddings: sampling the prior. B prompts, D embedding width, K codes of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.diffusion.guidance import guided
from genpipe.diffusion.noise import choices, integers, normal
from genpipe.diffusion.process import DiffusionConfig, Model, SamplerConfig, denoiser, sample, with_guidance
from genpipe.generation.conditions import Statistics, Text
from genpipe.models.autoregressive_prior import AutoregressivePrior
from genpipe.models.prior import DiffusionPrior, Prior


def in_unit_variance(text_embed: Tensor) -> Tensor:
    """Unit vectors [B, D] brought to about unit variance per dimension, as the priors take text embeddings."""
    return text_embed * text_embed.shape[-1] ** 0.5


def prior_model(prior: DiffusionPrior, text: Text, *, drop_text: Tensor) -> Model:
    """The diffusion prior with its caption bound; `text.embed` is brought to unit variance, as the image embedding."""
    embed = in_unit_variance(text.embed)
    return lambda x, t: prior(
        x, t=t, text_embed=embed, text_encodings=text.encodings, text_mask=text.text_mask, drop_text=drop_text
    )


def code_losses(prior: AutoregressivePrior, image_embeds: Tensor, text: Text, *, drop_text: Tensor) -> Tensor:
    """Negative log-likelihood of each image embedding's codes, in nats a code, fp32 [B].

    image_embeds: unit vectors [B, D]; drop_text: bool [B].
    """
    codes = prior.codes.encode(image_embeds)
    logits = prior(
        codes,
        dot=prior.codes.encode_dot((image_embeds * text.embed).sum(-1)),
        text_embed=in_unit_variance(text.embed),
        text_encodings=text.encodings,
        text_mask=text.text_mask,
        drop_text=drop_text,
    )
    return F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(1)


def sample_image_embeds(
    prior: Prior,
    text: Text,
    *,
    statistics: Statistics,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    candidates: int,
    generator: torch.Generator,
) -> Tensor:
    """Image embeddings for captions, unit vectors [B, D]: of `candidates` samples the best match with the text.

    unCLIP (Ramesh et al. 2022), section 2.2: two samples, the higher dot product with the text embedding is kept. Of
    `statistics`, `diffusion` and `sampler` the autoregressive prior takes the guidance scale alone.
    """
    many = text.repeated(candidates)
    if isinstance(prior, AutoregressivePrior):
        x = draw_codes(prior, many, guidance_scale=sampler.guidance_scale, generator=generator)
    else:
        keep = torch.zeros(len(many.embed), dtype=torch.bool, device=many.embed.device)
        model = with_guidance(
            prior_model(prior, many, drop_text=keep),
            prior_model(prior, many.repeated(2), drop_text=torch.cat([keep, ~keep])),
            cfg=sampler,
            steps=diffusion.steps,
        )
        x = statistics.restore(_draw(model, many, diffusion=diffusion, sampler=sampler, generator=generator))
    embeds = F.normalize(x, dim=-1).view(candidates, len(text.embed), -1)
    best = (embeds * text.embed).sum(-1).argmax(0)
    return embeds[best, torch.arange(len(best), device=best.device)]


def unconditional_image_embeds(
    prior: Prior,
    text: Text,
    *,
    statistics: Statistics,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    generator: torch.Generator,
) -> Tensor:
    """As many image embeddings as there are captions in `text`, which are dropped: unit vectors [B, D]."""
    if isinstance(prior, AutoregressivePrior):
        return F.normalize(draw_codes(prior, text, guidance_scale=0.0, generator=generator), dim=-1)
    drop = torch.ones(len(text.embed), dtype=torch.bool, device=text.embed.device)
    model = prior_model(prior, text, drop_text=drop)
    x0 = _draw(model, text, diffusion=diffusion, sampler=sampler, generator=generator)
    return F.normalize(statistics.restore(x0), dim=-1)


def _draw(
    model: Model, text: Text, *, diffusion: DiffusionConfig, sampler: SamplerConfig, generator: torch.Generator
) -> Tensor:
    """Standardized embeddings [B, D] from a diffusion prior that has its captions bound."""
    noise = normal(tuple(text.embed.shape), generator, device=text.embed.device)
    return sample(denoiser(model, diffusion), noise, sampler, diffusion=diffusion, generator=generator)


@torch.no_grad()
def draw_codes(prior: AutoregressivePrior, text: Text, *, guidance_scale: float, generator: torch.Generator) -> Tensor:
    """Image embeddings [B, D], drawn code by code; not normalized.

    Asked for a dot product with the text above the quantile `dot_above` (Ramesh et al. 2022, section 2.2: the top
    half). Guidance (Ho & Salimans 2022) is on the logits; `guidance_scale` 1 is the conditional model, 0 the
    unconditional one.
    """
    cfg, device, count = prior.cfg, text.embed.device, len(text.embed)
    lowest = int(cfg.dot_above * cfg.dot_buckets)
    dot_B = integers(lowest, cfg.dot_buckets, (count,), generator, device=device)
    times = 1 if guidance_scale == 1.0 else 2  # the captions, then without them
    many = text.repeated(times)
    logits, drawing = prior.start(
        dot_B.repeat(times),
        text_embed=in_unit_variance(many.embed),
        text_encodings=many.encodings,
        text_mask=many.text_mask,
        drop_text=torch.arange(times * count, device=device) >= count,
    )
    codes = [_choose(logits, guidance_scale, generator=generator)]
    for _ in range(prior.components - 1):
        logits = prior.extend(codes[-1].repeat(times), drawing)
        codes.append(_choose(logits, guidance_scale, generator=generator))
    return prior.codes.decode(torch.stack(codes, dim=1))


def _choose(logits: Tensor, guidance_scale: float, *, generator: torch.Generator) -> Tensor:
    """A code int64 [B] from logits [B, N]; with guidance [2 B, N], the conditional ones and then the others."""
    if guidance_scale != 1.0:
        cond, uncond = logits.chunk(2)
        logits = guided(cond, uncond, scale=guidance_scale)
    return choices(logits.softmax(-1), generator)
