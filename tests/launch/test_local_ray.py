"""A Ray of one's own, where machines differ."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from genpipe.launch.local_ray import TUNING, local_head


@pytest.mark.slow
def test_a_long_folder_of_temporary_files_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Path(tempfile.mkdtemp(prefix="as-long-as-that-of-a-user-of-macos-"))
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with local_head({**TUNING, **os.environ, "TMPDIR": str(long)}) as head:
        assert head.capacity["CPU"] > 0
    shutil.rmtree(long)
