"""What the flow knows before it has to: stages that no longer fit once something is made."""

from __future__ import annotations

import re

import pytest
from conftest import TinyPipeline

from flows.pipeline import _check_ahead, _Run
from flows.reporting import PlainReporter

PROMPTS = "stages.sample.prompts={kind: list, captions_of: train, texts: [a small red circel]}"


def test_a_caption_that_no_sample_has_is_told_as_soon_as_the_shards_are_there(
    tiny: TinyPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after the trainings that stand between the shards and the samples."""
    fresh = "stages.shard.split_seed=11"
    plans = tiny.plan(fresh, PROMPTS)
    assert plans["shard"].status == "run", "before there are shards nobody can know"
    run = _Run(tiny.load(fresh, PROMPTS), plans, PlainReporter())
    _check_ahead(run, plans["shard"])
    assert run.misfits == {}
    tiny.run("shard", fresh)
    _check_ahead(run, plans["shard"])
    assert list(run.misfits) == ["sample"], "the stage that does not fit fails, not the one that was made"
    assert all(said in run.misfits["sample"] for said in ("stages.sample", "circel", "shard was made"))
    assert re.fullmatch(r"sample: failed \(.*circel.*\)\n", capsys.readouterr().out), "at once"
