"""genpipe: train image-generating systems in stages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genpipe.api import LoadedSystem, load, plan, run

__all__ = ["LoadedSystem", "__version__", "load", "plan", "run"]
__version__ = "0.1.0"

# Nobody's usage is reported to anybody; these are read by the libraries when they are imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("DO_NOT_TRACK", "true")

# Threads of a matrix product that wait for one another spin by default for long enough to stop all progress when
# anything else runs: two threads fell from 585 to 40 samples/s beside one busy process, with this from 560 to 240.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    """The Python API, read when it is first asked for: `import genpipe` alone takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from genpipe import api

    return getattr(api, name)
