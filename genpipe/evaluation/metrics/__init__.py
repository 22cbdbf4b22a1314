"""Metrics of samples against a reference, a file each: their settings are the union `MetricConfig`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from genpipe.evaluation.metrics.classification import ClassificationConfig
from genpipe.evaluation.metrics.cmmd import CmmdConfig
from genpipe.evaluation.metrics.composition import CompositionConfig
from genpipe.evaluation.metrics.frechet import FrechetConfig
from genpipe.evaluation.metrics.grid import GridConfig
from genpipe.evaluation.metrics.heldout import HeldoutConfig
from genpipe.evaluation.metrics.inception_score import InceptionScoreConfig
from genpipe.evaluation.metrics.kid import KidConfig
from genpipe.evaluation.metrics.likelihood import LikelihoodConfig
from genpipe.evaluation.metrics.memorization import MemorizationConfig
from genpipe.evaluation.metrics.nearest_real import NearestRealConfig
from genpipe.evaluation.metrics.prdc import PrdcConfig
from genpipe.evaluation.metrics.reconstruction import ReconstructionConfig
from genpipe.evaluation.metrics.retrieval import RetrievalConfig
from genpipe.evaluation.metrics.speed import SpeedConfig

MetricConfig = Annotated[
    RetrievalConfig
    | NearestRealConfig
    | FrechetConfig
    | KidConfig
    | CmmdConfig
    | PrdcConfig
    | InceptionScoreConfig
    | ClassificationConfig
    | MemorizationConfig
    | CompositionConfig
    | ReconstructionConfig
    | LikelihoodConfig
    | SpeedConfig
    | HeldoutConfig
    | GridConfig,
    Field(discriminator="kind"),
]
"""How to measure; every one of them is a `metric.Metric` or, on features, a `features.FeatureMetric`."""
