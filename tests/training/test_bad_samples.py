"""Damage met by two ranks: both know all of it and stop together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rank_processes import SAMPLES, Outcome, count_damage
from ranks import run_ranks

from genpipe.data.images import encode
from genpipe.data.order import order
from genpipe.data.shards import ShardWriter

DAMAGED = {3, 20, 41}


@pytest.mark.services
def test_ranks_count_together_and_stop_together(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, split="train", part=0, max_samples=99, max_bytes=10**6) as writer:
        for i in range(SAMPLES):
            image = b"nothing" if i in DAMAGED else encode(np.full((8, 8, 3), i, np.uint8), format="png")
            facts = {"group": "g", "format": "png", "height": 8, "width": 8, "captions": ["c"], "meta": {}}
            writer.write(f"key-{i}", image=image, **facts)  # type: ignore[arg-type]
    run_ranks(count_damage, str(tmp_path), ranks=2)
    outcomes = [Outcome(**json.loads((tmp_path / f"outcome-{rank}").read_text())) for rank in (0, 1)]

    read = order(np.arange(SAMPLES), n=SAMPLES, seed=0)
    expected = [sum(i in DAMAGED for i in read[: 4 * step].tolist()) for step in range(1, 15)]
    assert outcomes[0].counts == outcomes[1].counts == expected
    assert outcomes[0].error == outcomes[1].error
    assert outcomes[0].error.startswith("3 of 60 samples were damaged, such as key-")
    ledger = [json.loads(line) for line in outcomes[0].files["bad_samples-0.jsonl"].splitlines()]
    assert {row["key"] for row in ledger} == {f"key-{i}" for i in DAMAGED}
    assert {row["source"] for row in ledger} == {"train-00000-00.tar"}
    assert outcomes[1].files == {}
