"""What a release writes for diffusers and transformers, loaded there: the same pictures and the same embeddings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import pytest
import torch

from genpipe.artifacts import fetch
from genpipe.generation.conditions import Conditions
from genpipe.generation.systems import load_released

if TYPE_CHECKING:
    from conftest import TinyPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
CPU = torch.device("cpu")

UNET = "{kind: unet, width: 16, multipliers: [1, 2], blocks: 1, attention_at: [2], head_width: 8, groups: 8}"
DIFFUSION = "{schedule: scaled_linear, predict: eps, time_sampling: discrete, weighting: none}"
PIXEL = (
    "stages.decoder.condition=none",
    f"stages.decoder.model.denoiser={UNET}",
    f"stages.decoder.diffusion={DIFFUSION}",
    "stages.decoder.observe.sampler={steps: 4}",
    "stages.release.rows=1",
    "stages.release.inputs={evaluate: null, sample: null}",
)
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIMPipeline": ("{kind: ddim, steps: 10}", {"num_inference_steps": 10, "eta": 0.0}),
    "DDPMPipeline": ("{kind: ddpm, steps: 20, threshold: static}", {"num_inference_steps": 20}),
}


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def told(folder: Path) -> str:
    return (folder / "MODEL_CARD.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_unconditional_system_is_a_pipeline_of_diffusers(pixel_tiny: TinyPipeline, name: str) -> None:
    """As the model card says that it is called; with the noise of the same generator the pictures are the same."""
    import diffusers

    sampler, call = SAMPLERS[name]
    folder = fetch(pixel_tiny.run("release", *PIXEL, f"stages.system.model.decoder={sampler}"))
    arguments = ", ".join(f"{argument}={value}" for argument, value in call.items())
    assert f'`{name}.from_pretrained("diffusers")({arguments})`' in told(folder)
    pipeline = getattr(diffusers, name).from_pretrained(folder / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(batch_size=2, generator=gen(), output_type="np", **call).images
    with torch.no_grad():
        expected = load_released(folder, device=CPU).sample(Conditions(2), generator=gen()) / 2 + 0.5
    torch.testing.assert_close(torch.from_numpy(found).permute(0, 3, 1, 2), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.05
