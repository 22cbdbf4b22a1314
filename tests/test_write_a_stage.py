"""The example of docs/write-a-stage.md, run as it stands there, from a folder outside of genpipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genpipe.artifacts import Artifact, read_manifest
from genpipe.launch.local import run_local
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import plan, spec_of

PAGE = Path(__file__).parent.parent / "docs/write-a-stage.md"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's module, its pipeline, and plain pictures of one color each."""
    page = PAGE.read_text()
    [module] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [pipeline] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "colors").mkdir()
    (tmp_path / "colors/means.py").write_text(module)
    (tmp_path / "colors.yaml").write_text(pipeline)
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        Image.new("RGB", (40, 40), (200, 100, 10 + i % 2)).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"plain picture {i}")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("colors", "colors.means"):
        sys.modules.pop(name, None)


def run(project: Path) -> Artifact:
    pipeline = load_pipeline(str(project / "colors.yaml"))
    for name in pipeline.instances:
        planned = plan(pipeline, only=[name])[-1]
        made = run_local(spec_of(planned, pipeline))
    return made


def test_the_example_runs_from_its_own_package(project: Path) -> None:
    made = run(project)
    manifest = read_manifest(made.uri)
    assert manifest is not None and manifest.identity["stage"] == "colors.means"
    assert made.kind == "color_means" and str(project / "runs/artifacts/color_means") in made.uri
    written = json.loads(Path(made.uri, "means.json").read_text())
    np.testing.assert_allclose(written, [200, 100, 10.5], atol=1.5)  # JPEG
    assert manifest.metrics == dict(zip(("red", "green", "blue"), written, strict=True))


def test_what_does_not_fit_is_refused_before_anything_runs(project: Path) -> None:
    config = project / "colors.yaml"
    config.write_text(config.read_text().replace("size: 4", "size: 64"))
    with pytest.raises(ValueError, match=r"stages\.means: size 64"):
        plan(load_pipeline(str(config)))
    assert not (project / "runs").exists()
