"""`genpipe run` and `genpipe stage` for pipelines of toy stages, for tests to start, kill and start again."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def main(stage: str, path: str, *overrides: str) -> int:
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    import toybox

    toybox.install()
    import genpipe
    from flows.pipeline import run_one
    from flows.reporting import StageResult

    results: list[StageResult]
    try:
        results = genpipe.run(path, overrides) if stage == "all" else [run_one(stage, path, overrides)]
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    except ValueError as error:
        print(f"error: {error}", flush=True)
        return 2
    for result in results:
        print(f"RESULT {result.stage} {result.status} {result.message.splitlines()[0] if result.message else ''}")
    return int(any(result.status != "ran" and result.status != "cached" for result in results))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
