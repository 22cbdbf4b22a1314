"""`make chaos`: real runs of a small pipeline, a fault in each, and what became of them.

Every run is told to end with the weights of a run that nothing happened to, by itself or after the same command is
given once more; to leave no process behind; and to leave true records. Needs Linux; some faults need root's rights.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from chaos import processes, verdict  # noqa: E402
from chaos.faults import FAULTS, Fault, strike  # noqa: E402
from chaos.lab import WORKERS, Case, Lab  # noqa: E402
from chaos.moments import Missed  # noqa: E402
from hosts import Missing  # noqa: E402

SECONDS = {"alone": 240.0, "torchrun": 300.0, "pipeline": 600.0}
"""What a command may take after the strike, on a machine that has other work, too."""
TRIES = 3


class Result(NamedTuple):
    """What became of one fault."""

    name: str
    moment: str
    end: str
    seconds: float
    troubles: Sequence[str]
    lost: int = 0

    def describe(self, seed: int) -> str:
        """The fault's line."""
        said = "; ".join(self.troubles) or ("skipped" if self.end == "skipped" else "ok")
        lost = f" ({self.lost} records lost)" if self.lost else ""
        return f"{self.name} | seed {seed} | {self.moment} | {self.end} | {self.seconds:.0f} s | {said}{lost}"


def attempt(lab: Lab, name: str, *, seed: int, turn: int) -> Result:
    """Inject one fault, the `turn`-th of its kind; tried again where the run was too fast for its moment."""
    first = Random(f"{seed} {name}").randrange(len(FAULTS[name].moments))
    for again in range(TRIES):
        random = Random(f"{seed} {name} {turn} {again}")
        try:
            return _inject(lab, name, FAULTS[name], random, turn=first + turn)
        except Missed as missed:
            reason = str(missed)
            print(f"{name}: once more, as {reason}", file=sys.stderr, flush=True)
    return Result(name, "never", "not injected", 0.0, [f"{TRIES} runs were over before its moment: {reason}"])


def _inject(lab: Lab, name: str, fault: Fault, random: Random, *, turn: int) -> Result:
    reference = lab.reference(WORKERS[fault.launcher])
    case = lab.case(fault.launcher, random)
    keep = True
    try:
        try:
            fault.place(case)
        except Missing as missing:
            return Result(name, "-", "skipped", 0.0, [str(missing)])
        case.start()
        moment = strike(case, fault, turn=turn)
        struck = time.monotonic()
        end, troubles = _finish(case, seconds=fault.seconds or SECONDS[fault.launcher])
        seconds = time.monotonic() - struck
        troubles += verdict.troubles(case, reference)
        outputs = "\n".join(case.output(number) for number in range(len(case.started)))
        if fault.says and not re.search(fault.says, outputs):
            troubles.append(f"no command says {fault.says!r}")
        keep = bool(troubles)
        if keep:
            troubles.append(f"kept in {case.folder}")
        return Result(name, moment, end, seconds, troubles, verdict.lost_steps(case, reference) if not keep else 0)
    except Missed:
        keep = False
        raise
    except Exception as error:
        return Result(name, "?", "the harness failed", 0.0, [f"{type(error).__name__}: {error}; {case.folder}"])
    finally:
        processes.kill_all()
        processes.reap(keep=())
        case.close(keep=keep)


def _finish(case: Case, *, seconds: float) -> tuple[str, list[str]]:
    """Wait for the end of what was started, and give the same command once more where none succeeded."""
    troubles = []
    if not case.wait(seconds=seconds):
        troubles.append(f"not ended after {seconds:.0f} s, and killed")
    if any(process.returncode == 0 for process in case.started):
        return "by itself", troubles
    again = case.start()
    if not case.wait(seconds=seconds):
        troubles.append(f"the rerun did not end in {seconds:.0f} s")
    if again.returncode:
        troubles.append(f"the rerun failed: {case.output().strip().splitlines()[-1:]}")
        return "not at all", troubles
    return "one rerun", troubles


def _schedule(names: Sequence[str], *, count: int) -> list[tuple[str, int]]:
    """So many faults, each with its turn: all names once, then the ones that cost seconds again and again."""
    cheap = [name for name in names if FAULTS[name].launcher != "pipeline"] or names
    turns: Counter[str] = Counter()
    schedule = []
    for name in islice(chain(names, cycle(cheap)), count):
        schedule.append((name, turns[name]))
        turns[name] += 1
    return schedule


def _table(results: Sequence[Result]) -> str:
    """The results by fault, as Markdown."""
    lines = ["| fault | injected | by itself | one rerun | failed | seconds to the end |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(result.name for result in results):
        of = [result for result in results if result.name == name]
        if skipped := [result for result in of if result.end == "skipped"]:
            lines.append(f"| {name} | skipped: {skipped[0].troubles[0]} | | | | |")
            continue
        good = [result for result in of if not result.troubles]
        alone, again = (sum(result.end == end for result in good) for end in ("by itself", "one rerun"))
        seconds = sorted(result.seconds for result in of)[len(of) // 2]
        lines.append(f"| {name} | {len(of)} | {alone} | {again} | {len(of) - len(good)} | {seconds:.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status: 1 if a run did not come through."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", help="a fault, or the beginning of several names")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--count", type=int, default=0, help="faults to inject, each name in turn; default: 60 at least"
    )
    parser.add_argument("--list", action="store_true", help="list the faults")
    given = parser.parse_args(arguments)
    names = [name for name in FAULTS if not given.only or name.startswith(tuple(given.only))]
    if not names:
        parser.error(f"no fault is called {', '.join(given.only)}; --list lists them")
    if given.list:
        print("\n".join(names))
        return 0
    schedule = _schedule(names, count=given.count or (len(names) if given.only else max(60, len(names))))
    processes.adopt_orphans()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started this with `&`, for the runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    folder = Path(f"/tmp/c{os.getpid()}")  # short: Ray's sockets lie below it, and a path of one has 107 bytes
    folder.mkdir()
    lab, results = Lab(folder), []
    try:
        for number, (name, turn) in enumerate(schedule, 1):
            result = attempt(lab, name, seed=given.seed, turn=turn)
            results.append(result)
            print(f"{number}/{len(schedule)} {result.describe(given.seed)}", flush=True)
    finally:
        processes.kill_all()
        lab.close()
    failed = [result for result in results if result.troubles and result.end != "skipped"]
    skipped = [result for result in results if result.end == "skipped"]
    print(f"\n{_table(results)}\n\n{len(results) - len(skipped)} faults, {len(failed)} failed, {len(skipped)} skipped")
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
