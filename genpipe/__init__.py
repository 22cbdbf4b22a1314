"""genpipe: train image-generating systems in stages."""

import os

__version__ = "0.1.0"

# Nobody's usage is reported to anybody; these are read by the libraries when they are imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("DO_NOT_TRACK", "true")

# Threads of a matrix product that wait for one another spin by default for long enough to stop all progress when
# anything else runs: two threads fell from 585 to 40 samples/s beside one busy process, with this from 560 to 240.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
