"""`make cluster`: one machine plays a cluster, and what genpipe promises of one is tried on it.

Network namespaces are its hosts, with PostgreSQL, an S3 server, MLflow with users, Prefect and a worker, a Ray head and
its nodes, each asking for its credential. A line a claim. Needs Linux and root's rights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from cluster.claims import CLAIMS, Rehearsal  # noqa: E402
from cluster.services import Cluster  # noqa: E402
from hosts import Missing  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status: 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="make cluster", description=__doc__)
    parser.add_argument("--without", metavar="CLAIM", action="append", default=[], help="leave a claim out")
    parser.add_argument("--keep", action="store_true", help="keep everything running afterwards, until Ctrl-C")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started this with `&`
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    folder = Path(f"/tmp/k{os.getpid()}")  # short: Ray's sockets lie below it, and a path of one has 107 bytes
    folder.mkdir()
    begun = time.monotonic()
    try:
        cluster = Cluster(folder)
    except Missing as missing:
        print(f"skipped: {missing}")
        shutil.rmtree(folder)
        return 0
    try:
        print(f"ok     the cluster is up | {time.monotonic() - begun:.0f} s", flush=True)
        team = Rehearsal(cluster)
        failed = [name for name in CLAIMS if name not in given.without and not _holds(name, team)]
        if given.keep:
            _keep(cluster)
    finally:
        cluster.close()
    print(f"\n{len(CLAIMS) - len(given.without) - len(failed)} claims hold, {len(failed)} do not; see {folder}")
    return int(bool(failed))


def _holds(name: str, team: Rehearsal) -> bool:
    begun = time.monotonic()
    try:
        seen = CLAIMS[name](team)
    except Exception as error:
        print(f"FAILED {name} | {time.monotonic() - begun:.0f} s | {type(error).__name__}: {error}", flush=True)
        return False
    print(f"ok     {name} | {time.monotonic() - begun:.0f} s | {seen}", flush=True)
    return True


def _keep(cluster: Cluster) -> None:
    print("\n".join(f"export {name}={value}" for name, value in cluster.laptop.items()))
    with suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
