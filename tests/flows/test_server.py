"""The home of Prefect's own server."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.server import check_home


def test_a_home_that_cannot_be_written_is_named_with_what_sets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    (tmp_path / "file").write_text("in the way")
    home = tmp_path / "file" / "home"
    with temporary_settings(updates={PREFECT_HOME: home}, restore_defaults={PREFECT_API_URL}):
        with pytest.raises(ValueError) as error:
            check_home()
        for named in ("PREFECT_HOME", str(home), "HOME, which is /nonexistent"):
            assert named in str(error.value)
    with temporary_settings(updates={PREFECT_HOME: home, PREFECT_API_URL: "http://prefect:4200/api"}):
        check_home()
    with temporary_settings(updates={PREFECT_HOME: tmp_path / "new"}, restore_defaults={PREFECT_API_URL}):
        check_home()
