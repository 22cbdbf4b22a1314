"""Ranks agree on what one of them knows, by real gloo processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folder_runtime import FolderRuntime
from rank_processes import RANKS, agree
from ranks import run_ranks

from genpipe.training.agreement import Agreement


@pytest.mark.services
@pytest.mark.parametrize("round_seconds", [0.0, 0.05])
def test_all_see_at_the_same_step_what_one_raised(tmp_path: Path, round_seconds: float) -> None:
    run_ranks(agree, str(tmp_path), round_seconds, ranks=RANKS)
    (first, rounds), (second, _) = (json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(RANKS))
    assert first == second
    if round_seconds:
        assert 3 < first[0] < 400 and rounds < 200, "fast steps share a round"
    else:
        assert first == [4, 5], "at the next step, and what was raised until then"


@pytest.mark.services
def test_one_rank_sees_its_flags_at_once(tmp_path: Path) -> None:
    agreement = Agreement(FolderRuntime(tmp_path), flags=2)
    assert agreement.ask(False, True) == [False, True]
    agreement.close()
