"""Gates against a baseline on the tiny pipeline: what a baseline stands for, what passes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from gallery import Gallery

from genpipe.artifacts import Artifact, read_manifest
from genpipe.config import ConfigError
from genpipe.evaluation.comparison import Judgment, judge
from genpipe.launch.garbage import survey
from genpipe.launch.local import run_local
from genpipe.pipeline.baselines import with_baselines
from genpipe.pipeline.plan import Planned, plan, resolve_uri, spec_of
from genpipe.release.scores import missed_gates

if TYPE_CHECKING:
    from conftest import TinyPipeline

pytestmark = pytest.mark.slow

NUMBER = "train/self_cosine"
ALIKE = "stages.system.model.decoder.steps=5"
WORSE = "stages.decoder.train.samples=16"


def gated(tiny: TinyPipeline, baseline: str, *overrides: str, number: str = NUMBER, **gate: float) -> Planned:
    """The evaluation in a plan with a gate against a baseline; `models:/unclip@champion` is the tiny system."""
    gates = json.dumps({number: {"not_worse_than": baseline, **gate}})
    pipeline = tiny.load(f"stages.evaluate.observe.gates={gates}", *overrides)

    def resolve(uri: str) -> Artifact:
        return tiny.run("system") if uri == "models:/unclip@champion" else resolve_uri(uri)

    return with_baselines(plan(pipeline), pipeline, resolve=resolve)[-1]


def judged(tiny: TinyPipeline, *overrides: str, **gate: float) -> Judgment:
    """What comes of a run that is held against the tiny pipeline's scores, and is what its artifact says of it."""
    scores = tiny.run("evaluate").uri
    tiny.run("sample", *overrides)
    planned = gated(tiny, scores, *overrides, **gate)
    if planned.status == "run":
        made = run_local(spec_of(planned, tiny.load(*overrides)))
        [said] = json.loads(Path(made.uri, "scores.json").read_text())["against"].items()
        [own] = judge(made, planned.instance.cfg.observe.gates).items()
        assert said == (NUMBER, json.loads(json.dumps(own[1].as_json(NUMBER))))
        manifest = read_manifest(made.uri)
        assert manifest is not None, "what is worse is not released either"
        assert missed_gates([manifest]) == ([own[1].told(NUMBER)] if own[1].missed else [])
    return judge(planned.artifact, planned.instance.cfg.observe.gates)[NUMBER]


def test_much_the_same_passes_and_worse_fails(tiny: TinyPipeline) -> None:
    same = judged(tiny)
    assert same.difference is not None and not same.missed
    assert (same.difference.value, same.difference.low, same.difference.high, same.difference.pictures) == (0, 0, 0, 16)
    alike, worse = judged(tiny, ALIKE), judged(tiny, WORSE)
    assert alike.difference is not None and alike.difference.low < 0 < alike.difference.high and not alike.missed
    assert worse.missed and "differs by -" in worse.told(NUMBER)
    assert not judged(tiny, WORSE, margin=5).missed


def test_what_a_baseline_may_be(tiny: TinyPipeline, tmp_path: Path) -> None:
    scores = tiny.run("evaluate")
    file = tmp_path / "other.yaml"
    shard = {"source": {"path": str(tiny.shapes)}}
    file.write_text(yaml.safe_dump({"base": str(tiny.config), "store": str(tiny.store), "stages": {"shard": shard}}))
    store = tmp_path / "moved/artifacts/scores"
    shutil.copytree(scores.uri, store / Path(scores.uri).name)
    system = tiny.run("system")
    (tmp_path / "empty").mkdir()
    release = Gallery(tmp_path / "releases").commit("release", tmp_path / "empty", inputs={"system": system})
    named = (scores.uri, str(file), str(tmp_path / "moved"), "models:/unclip@champion", system.uri, release.uri)
    for baseline in named:
        gate = gated(tiny, baseline, ALIKE).instance.cfg.observe.gates[NUMBER]
        found = read_manifest(gate.not_worse_than)
        assert found is not None and found.artifact.fingerprint == scores.fingerprint, baseline


def test_a_baseline_is_needed_as_long_as_a_plan_names_it(tiny: TinyPipeline) -> None:
    scores = tiny.run("evaluate")
    gates = json.dumps({NUMBER: {"not_worse_than": scores.uri}})
    with_gate, without = (tiny.load(ALIKE, *more) for more in ([f"stages.evaluate.observe.gates={gates}"], []))
    for pipeline, stays in ((with_gate, f"in the plan of {tiny.config}"), (without, "")):
        found = {folder.path: folder.stays for folder in survey(str(tiny.store), [pipeline], days=0)}
        assert found[f"artifacts/{scores.name}"] == stays


def test_baselines_that_do_not_fit_are_refused_by_the_plan(tiny: TinyPipeline, tmp_path: Path) -> None:
    scores, clip = tiny.run("evaluate").uri, tiny.run("clip").uri
    tiny.run("sample", seed := "stages.sample.seed=11")  # which no other test measures in this store
    tiny.run("sample", fewer := "stages.sample.prompts.train=9")
    for baseline, told, overrides in (
        (scores, "drawn with seed 11, the baseline with 0", [seed]),
        (scores, "9 pictures, the baseline's are 16, and they are of other prompts", [fewer]),
        (str(tmp_path / "store"), "neither a pipeline's YAML file, nor scores", []),
        (clip, "stands for an artifact of kind clip, neither scores nor a system", []),
        ("models:/unclip@champion", "no scores in .* measured with these settings; .*; measured otherwise", [seed]),
    ):
        with pytest.raises(ConfigError, match=rf"stages\.evaluate.*{told}"):
            gated(tiny, baseline, *overrides)
    with pytest.raises(ConfigError, match="pool is a number of whole sets"):
        gated(tiny, scores, number="pool")
    with pytest.raises(ConfigError, match="has no values of single pictures of train/self_recall_at_3"):
        gated(tiny, scores, "stages.evaluate.metrics.retrieval.recall_at=[3]", number="train/self_recall_at_3")
    with pytest.raises(ConfigError, match=r"stages.prior.observe.gates.loss.* only scores have values"):
        pipeline = tiny.load('stages.prior.observe.gates={"loss": {"not_worse_than": "x/y"}}')
        with_baselines(plan(pipeline), pipeline)
