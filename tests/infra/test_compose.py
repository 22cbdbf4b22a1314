from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).parents[2] / "infra/compose"
TEXT = (COMPOSE / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]


def choices() -> dict[str, str]:
    lines = (COMPOSE / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_all_there_is_to_choose_is_in_the_example() -> None:
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", TEXT))
    assert used == choices().keys()


def test_no_secret_has_a_default() -> None:
    """A secret that is not set is refused by Compose (`:?`), and the example's own are placeholders."""
    secrets = [name for name in choices() if re.search("PASSWORD|KEY|TOKEN", name)]
    assert len(secrets) == 7
    for name in secrets:
        assert set(re.findall(rf"\$\{{{name}(.*?)\}}", TEXT)) == {":?"}
        assert "CHANGE-ME" in choices()[name] or name == "S3_ACCESS_KEY"


def test_ports_are_on_loopback_by_default() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("${BIND:-127.0.0.1}:") for port in ports)
    assert choices()["BIND"] == "127.0.0.1"


def test_services_say_whether_they_are_healthy_and_wait_for_what_they_need() -> None:
    once = {"buckets"}
    for name, service in SERVICES.items():
        assert ("healthcheck" in service) == (name not in once), name
        for need, how in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if need in once else "service_healthy"
            assert how == {"condition": expected} and need in SERVICES
        assert not service["image"].endswith("latest")


def test_every_service_asks_for_a_credential() -> None:
    environment = {name: service.get("environment", {}) for name, service in SERVICES.items()}
    assert "POSTGRES_PASSWORD" in environment["postgres"]
    assert "AWS_SECRET_ACCESS_KEY" in environment["s3"]
    assert {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"} <= environment["mlflow"].keys()
    assert "--app-name" in SERVICES["mlflow"]["command"]
    assert "PREFECT_SERVER_API_AUTH_STRING" in environment["prefect"]
    assert environment["ray-head"]["RAY_AUTH_MODE"] == environment["ray-worker"]["RAY_AUTH_MODE"] == "token"
