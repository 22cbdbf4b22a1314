"""What a run's page says, where it is long or was written by somebody else."""

from __future__ import annotations

from genpipe.tracking.open_runs import PipelineRecord
from genpipe.tracking.pages import MAX_TEXT, is_ours, pipeline_page


def test_a_long_table_is_cut_between_rows() -> None:
    rows = tuple({"stage": f"stage_{i}", "status": "ran", "seconds": 1.0, "run_id": "0" * 32} for i in range(200))
    record = PipelineRecord(name="many", experiment="many", tags={}, rows=rows)
    text = pipeline_page(record, link=lambda run_id: f"#/{run_id}")
    assert len(text) <= MAX_TEXT
    assert is_ours(text)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) > 50
    assert all(line.count("|") == 6 for line in table)


def test_why_a_stage_ran_stands_apart_from_what_came_of_it() -> None:
    rows = (
        {"stage": "clip", "status": "ran", "seconds": 61.0, "headline": "loss 2.31", "message": "not made yet"},
        {"stage": "prior", "status": "cached", "headline": "loss 0.20", "message": "made 2 days ago"},
    )
    text = pipeline_page(PipelineRecord(name="one", experiment="one", tags={}, rows=rows), link=str)
    assert "| clip | ran | 1m01s | loss 2.31 | not made yet |" in text
    assert "| prior | cached |  | loss 0.20 |  |" in text


def test_what_somebody_else_wrote_is_theirs() -> None:
    record = PipelineRecord(name="one", experiment="one", tags={})
    text = pipeline_page(record, link=str)
    assert is_ours("") and is_ours(text)
    assert not is_ours("our best run") and not is_ours(text + "\nNote: bad seed")
