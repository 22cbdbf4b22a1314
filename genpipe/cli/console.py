"""What a person sees: progress while stages run, tables when they are done."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from genpipe.pipeline.spec import Progress as StageProgress

COLORS = {"cached": "cyan", "ran": "green", "lost": "yellow", "failed": "red", "skipped": "yellow"}

WIDEST = 100_000  # characters of a line on a pipe

out = Console()
err = Console(stderr=True)


class Display:
    """Shows stages as they run as bars on a terminal. Safe to call from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[stage]:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=out,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.noted: dict[str, str] = {}

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def update(self, stage: str, status: str, *, progress: StageProgress | None = None, message: str = "") -> None:
        """A running stage has a bar; one that ended leaves a line."""
        with self.lock:
            if status == "running":
                self._running(stage, progress)
            elif status in COLORS:
                self._ended(stage, status, message)

    def _running(self, stage: str, progress: StageProgress | None) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task("starting", stage=stage, total=None)
        if progress and progress.note != self.noted.get(stage, ""):
            self.noted[stage] = progress.note
            self.bars.print(f"{stage}: {progress.note}", highlight=False)
        if progress:
            self.bars.update(
                self.tasks[stage],
                description=progress.describe(),
                total=progress.total,
                completed=progress.done,
            )

    def _ended(self, stage: str, status: str, message: str) -> None:
        if stage in self.tasks:
            self.bars.remove_task(self.tasks.pop(stage))
        told = f" ({message.splitlines()[0]})" if message and status != "cached" else ""
        self.bars.print(f"{stage}: [{COLORS[status]}]{status}[/]", told, highlight=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their titles; on a pipe, no wider than it must be and never cut."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, no_wrap=not out.is_terminal)
    for row in rows:
        drawn.add_row(*map(str, row))
    if out.is_terminal:
        out.print(drawn)
    else:
        Console(width=WIDEST).print(drawn)


def problem(message: str) -> None:
    """Say what went wrong, on standard error."""
    err.print("error:", style="bold red", end=" ")
    err.print(message, highlight=False, markup=False, soft_wrap=True)
