"""Damaged samples met while training: counted over all ranks, written down, and stopped when they are too many."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from genpipe.data.loader import Batches
from genpipe.data.samples import Reject
from genpipe.training.runtime import Runtime

FEWEST_READ = 1000
MOST_TOLD = 1000


class Damage:
    """Follows what `batches` could not read, from `start` on. `report` must be called by all ranks alike."""

    def __init__(self, batches: Batches, rt: Runtime, *, length: int, max_share: float, start: int) -> None:
        self.batches, self.rt = batches, rt
        self.fewest, self.max_share = min(FEWEST_READ, length), max_share
        self.name = f"bad_samples-{start}.jsonl"  # a run that goes on keeps what it wrote before
        self.count = 0
        self.found: dict[str, Reject] = {}

    def report(self) -> int:
        """How often a sample was found damaged so far, over all ranks.

        Rank 0 keeps `bad_samples-START.jsonl` up to date: a line for each sample, the first 1,000 of each rank. Raises
        ValueError, on every rank, once they are more than the allowed share of at least 1,000 samples read (or of the
        whole split, where that is less).
        """
        known, fresh = len(self.found), self.batches.take_damaged()
        self.count += len(fresh)
        for reject in fresh:
            if len(self.found) < MOST_TOLD:
                self.found.setdefault(reject.key, reject)
        read, count, new = self._totals(self.batches.read, self.count, len(self.found) - known)
        if new:
            self._write_down()
        if read >= self.fewest and count > self.max_share * read:
            one = self._gathered()[-1]
            raise ValueError(
                f"{count} of {read} samples were damaged, such as {one.key} in {one.source} ({one.reason}: "
                f"{one.detail}); see {self.name}, run `genpipe data verify`, and restore the shards or take the "
                f"samples out with `genpipe data remove`; train.max_bad_share is {self.max_share}"
            )
        return count

    def _totals(self, *counts: int) -> list[int]:
        if self.rt.world_size == 1:
            return list(counts)
        totals = torch.tensor(counts, dtype=torch.int64, device=self.rt.device)
        dist.all_reduce(totals)
        return [int(total) for total in totals.tolist()]

    def _gathered(self) -> list[Reject]:
        """Every rank's, one of a key."""
        ranks: list[dict[str, Reject]] = [self.found] * self.rt.world_size
        if self.rt.world_size > 1:
            dist.all_gather_object(ranks, self.found)
        return list({key: reject for rank in ranks for key, reject in rank.items()}.values())

    def _write_down(self) -> None:
        rejects = self._gathered()
        if self.rt.rank != 0:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, self.name)
            path.write_text("".join(json.dumps(vars(reject), ensure_ascii=False) + "\n" for reject in rejects))
            self.rt.log_file(path)
