"""Everything from the stages down lives without Ray, Prefect and MLflow: imported and run with the three blocked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import importlib, importlib.abc, pkgutil, sys
from pathlib import Path

BLOCKED = {"ray", "prefect", "mlflow"}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return None

sys.meta_path.insert(0, Blocker())

import genpipe
ABOVE = ("genpipe.launch", "genpipe.tracking", "genpipe.cli", "genpipe.cli.console", "genpipe.cli.doctor")
names = [m.name for m in pkgutil.walk_packages(genpipe.__path__, "genpipe.") if not m.name.startswith(ABOVE)]
for name in names:
    importlib.import_module(name)
assert {f"genpipe.stages.{stage}" for stage in ("shard", "clip", "evaluate")} <= set(names), names

from genpipe.stages import shard
cfg = shard.Config.model_validate({"source": {"kind": "folder", "path": sys.argv[1]}, "image_size": 16})
(part,) = shard.parts(cfg, {})
stats = shard.Worker(cfg, {})(part, Path(sys.argv[2]))
meta, metrics = shard.finalize(cfg, {}, [stats], Path(sys.argv[2]))
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
print(int(metrics["samples_in"]), meta["image_size"])
"""


def test_stages_and_all_below_run_without_the_orchestrators(shapes: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(shapes), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["60", "16"]


@pytest.mark.parametrize("module", ["genpipe.launch.ray", "genpipe.launch.ray_ranks", "genpipe.launch.run_stage"])
def test_who_leads_a_training_has_no_use_for_torch_and_mlflow(module: str) -> None:
    """Each of its processes that imports them would make every stage begin seconds later."""
    script = f"import sys, {module}; print(sorted({{'torch', 'mlflow'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("module", ["genpipe.api", "genpipe.gallery.app", "genpipe.stages.decoder"])
def test_who_draws_has_no_use_for_sharded_tensors(module: str) -> None:
    """Nor for SymPy, which comes with them: seconds before the first picture."""
    script = f"import sys, {module}; print(sorted({{'torch.distributed.tensor', 'sympy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_files_stay_short_enough_to_be_read() -> None:
    """A file under 500 lines, and the one loop within 250."""
    root = Path(__file__).parent.parent
    files = [path for folder in ("genpipe", "flows", "tests") for path in (root / folder).rglob("*.py")]
    lines = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in files}
    assert len(lines) > 300 and {name: count for name, count in lines.items() if count >= 500} == {}
    assert lines["genpipe/training/loop.py"] <= 250
