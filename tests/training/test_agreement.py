"""Ranks agree on what one of them knows, by real gloo processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch.multiprocessing as mp
from folder_runtime import FolderRuntime
from rank_processes import RANKS, agree

from genpipe.training.agreement import Agreement


def test_all_see_at_the_next_step_what_one_raised(tmp_path: Path) -> None:
    mp.spawn(agree, args=(str(tmp_path),), nprocs=RANKS)
    first, second = (json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(RANKS))
    assert first == second == [[False, False]] * 4 + [[True, False], [False, False]]


def test_one_rank_sees_its_flags_at_once(tmp_path: Path) -> None:
    agreement = Agreement(FolderRuntime(tmp_path), flags=2)
    assert agreement.ask(False, True) == [False, True]
    agreement.close()
