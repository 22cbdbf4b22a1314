"""Cores as the kernel and a container give them, and what half of them is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from genpipe import stage_config
from genpipe.stage_config import Resources, cores


def test_a_process_on_one_core_has_one() -> None:
    bound = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    code = f"import os; from genpipe.stage_config import cores; {bound}; print(cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("written", "expected"),
    [({"cpu.max": "max 100000\n"}, 16), ({"cpu.max": "400000 100000\n"}, 4), ({"cpu.max": "50000 100000\n"}, 1),
     ({"quota": "250000\n", "period": "100000\n"}, 2), ({"quota": "-1\n", "period": "100000\n"}, 16), ({}, 16)],
)  # fmt: skip
def test_a_quota_limits_them(
    written: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sixteen cores; files as cgroups v2 and v1 write them, or none."""
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(stage_config, "QUOTAS", (f"{tmp_path}/cpu.max", f"{tmp_path}/quota {tmp_path}/period"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert cores() == expected
    assert Resources.model_validate({"cpus": "auto"}).cpus == max(1, expected // 2)


def test_a_number_is_taken_as_it_is() -> None:
    assert Resources(cpus=0.5).cpus == 0.5 and Resources().cpus == 1
    with pytest.raises(ValidationError, match="cpus"):
        Resources.model_validate({"cpus": "all"})
