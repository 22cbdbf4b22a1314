from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = ["infra/images/install.sh", "infra/slurm/genpipe.sbatch"]


def test_the_containerfile_has_no_lint() -> None:
    done = subprocess.run(
        [BIN / "hadolint", "--failure-threshold", "info", "infra/images/Containerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_no_lint(script: str) -> None:
    done = subprocess.run([BIN / "shellcheck", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_is_there() -> None:
    text = (ROOT / "infra/images/Containerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.*)$", text, re.MULTILINE)
    sources = [source for line in copied for source in line.split()[:-1]]
    assert len(sources) >= 8
    for source in sources:
        assert (ROOT / source).exists(), source


def test_the_image_holds_no_secret() -> None:
    text = (ROOT / "infra/images/Containerfile").read_text()
    assert not re.search(r"(PASSWORD|TOKEN|SECRET\w*|ACCESS_KEY\w*)=", text)
    assert text.index("USER 1000") < text.index("\nCMD")
