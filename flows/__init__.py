"""When stages run: the pipeline graph and its Prefect flows."""

import os

import genpipe as _genpipe  # for its settings of telemetry, before Prefect is imported  # noqa: F401

# A run prints its own account; Prefect's goes to Prefect's records, where its UI shows it.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
