"""What is claimed of a cluster. Each claim does what its users do, and returns what was seen."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import subprocess
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, NamedTuple

import httpx
import yaml
from browser import Browser
from cluster.services import BIN, ROOT, Cluster, wait_until
from seaweed import BUCKET
from shapes import draw_shape, draw_shapes

from genpipe.storage import open_storage

RUN_SECONDS = 1200.0
STORE, PICTURES = f"s3://{BUCKET}/runs", f"s3://{BUCKET}/pictures"
LONG = {"samples": 16_000, "global_batch_size": 16, "optim": {"kind": "adamw", "lr": 3e-3}, "ema_decay": 0.9}
CANCEL_SECONDS = 15.0
UNDER_WAY = ["PENDING", "RUNNING", "PAUSED", "CANCELLING"]


class FlowRun(NamedTuple):
    """A run of the deployment, as Prefect's API gives it: times in ISO 8601."""

    id: str
    state: str
    begun: str
    seconds: float


class Rehearsal:
    """A team's pipeline on the cluster: pictures in S3, a file on a laptop, a deployment."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        os.environ.update(cluster.aws)  # for this process, which looks into the store
        pictures = cluster.folder / "pictures"
        pictures.mkdir()
        draw_shapes(pictures)
        self.pictures, self.store = open_storage(PICTURES), open_storage(STORE)
        for path in sorted(pictures.iterdir()):
            self.pictures.write(path.name, path.read_bytes())
        self.config = cluster.folder / "team.yaml"
        self.config.write_text(yaml.safe_dump(self._settings()))
        self.seen: set[str] = set()
        self.fingerprint = self.digest = ""
        """Of the decoder that the last whole run has made."""

    def _settings(self) -> dict[str, Any]:
        observe = {"log_every": 50, "heldout_samples": 16, "validate_every": 8_000, "sampler": {"steps": 4}}
        decoder = {"train": LONG, "observe": observe, "resources": {"workers": 2, "checkpoint_seconds": 3}}
        return {
            "base": str(ROOT / "configs/pipeline/tiny.yaml"),
            "name": "team",
            "store": STORE,
            "ray": {"address": self.cluster.ray_url},
            "tracking": {"uri": self.cluster.mlflow_url},
            "stages": {"shard": {"source": {"path": PICTURES}}, "decoder": decoder},
        }

    # What Prefect knows

    def prefect(self, path: str, body: dict[str, Any]) -> Any:
        """What a route of Prefect's API answers to a POST."""
        answer = httpx.post(
            f"{self.cluster.prefect_url}/{path}", json=body, auth=self.cluster.prefect_login, timeout=30
        )
        return answer.raise_for_status().json()

    def flow_runs(self) -> list[FlowRun]:
        """The deployment's runs that have begun, the oldest first."""
        query = {"deployments": {"name": {"any_": ["team"]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        return [
            FlowRun(run["id"], run["state_type"], run["start_time"], run["total_run_time"])
            for run in self.prefect("flow_runs/filter", query)
            if run["start_time"]
        ]

    def next_completed(self, *, begun_after: str = "") -> FlowRun:
        """Wait for a run to complete that was not waited for before."""

        def find() -> FlowRun | None:
            for run in self.flow_runs():
                if run.id not in self.seen and run.begun > begun_after:
                    if run.state in ("FAILED", "CRASHED"):
                        raise AssertionError(f"the scheduled run is {run.state}: {self.cluster.folder}")
                    if run.state == "COMPLETED":
                        return run
            return None

        found: FlowRun = wait_until(find, "a scheduled run", seconds=RUN_SECONDS)
        self.seen |= {run.id for run in self.flow_runs() if run.begun <= found.begun}
        return found

    def pause(self) -> None:
        """Schedule no more runs, and wait until none is under way."""
        self.cluster.genpipe("deploy", "team", "--pause")
        query = {"deployments": {"name": {"any_": ["team"]}}, "flow_runs": {"state": {"type": {"any_": UNDER_WAY}}}}
        wait_until(lambda: not self.prefect("flow_runs/filter", query), "the last run to end", seconds=RUN_SECONDS)

    # What MLflow knows

    def mlflow(self, path: str, *, login: tuple[str, str] | None = None, **body: Any) -> Any:
        """What a route of MLflow's API answers to a POST, by default to its administrator."""
        url = f"{self.cluster.mlflow_url}/api/2.0/mlflow/{path}"
        answer = httpx.post(url, json=body, auth=login or self.cluster.mlflow_login, timeout=30)
        return answer.raise_for_status().json()

    def mlflow_runs(self, *, login: tuple[str, str] | None = None) -> list[dict[str, Any]]:
        """All runs of the pipeline with their settings, metrics and tags, the newest first."""
        found = self.mlflow("experiments/search", login=login, max_results=100)["experiments"]
        [experiment] = [each["experiment_id"] for each in found if each["name"] == "team"]
        found = self.mlflow("runs/search", login=login, experiment_ids=[experiment], max_results=1000)
        runs: list[dict[str, Any]] = found["runs"]
        for told in (values for run in runs for each in ("data", "inputs", "outputs") for values in run[each].values()):
            told.sort(key=json.dumps)  # as a database gives them, which is in no order
        return runs

    # What the store and Ray know

    def objects(self) -> dict[str, int]:
        """All that S3 holds, in both buckets: the sizes by the keys."""
        buckets = [f"s3://{BUCKET}", "s3://mlflow"]
        return {f"{bucket}/{entry.key}": entry.size for bucket in buckets for entry in open_storage(bucket).list()}

    def manifests(self) -> dict[str, str]:
        """The committed artifacts: kind/fingerprint, and the sha256 of the manifest."""
        return {
            "/".join(entry.key.split("/")[1:3]): hashlib.sha256(self.store.read(entry.key)).hexdigest()
            for entry in self.store.list("artifacts/")
            if entry.key.endswith("/manifest.json")
        }

    def remember_decoder(self, made: Iterable[str]) -> None:
        """Remember the decoder among the artifacts (kind/fingerprint) of a run."""
        [self.fingerprint] = [name.partition("/")[2] for name in made if name.startswith("decoder/")]
        self.digest = self.weights()

    def weights(self) -> str:
        """The sha256 over the decoder's files of weights."""
        total = hashlib.sha256()
        for entry in sorted(self.store.list(f"artifacts/decoder/{self.fingerprint}/")):
            if entry.key.endswith(".safetensors"):
                total.update(self.store.read(entry.key))
        return total.hexdigest()

    def decoder_jobs(self) -> int:
        """How many Ray jobs were submitted for the decoder."""
        return sum(f"-{self.fingerprint[:8]}" in job["submission_id"] for job in self.cluster.jobs())

    def running_jobs(self) -> list[str]:
        """Ray jobs that have not ended."""
        return [job["submission_id"] for job in self.cluster.jobs() if job["status"] in ("PENDING", "RUNNING")]

    def trained(self) -> int:
        """Samples that the decoder which is in training has seen, as its work folder says; 0 where there is none."""
        for entry in self.store.list("work/decoder/"):
            if entry.key.endswith("/progress.json"):
                return int(json.loads(self.store.read(entry.key)).get("done", 0))
        return 0

    def await_training(self) -> list[str]:
        """Wait until the decoder trains on two nodes and a tenth is done; their addresses."""
        share = LONG["samples"] / 10  # type: ignore[operator]
        wait_until(lambda: self.trained() >= share and len(self.cluster.rank_addresses()) == 2, "training", seconds=600)
        return self.cluster.rank_addresses()

    def forget_decoder(self) -> None:
        """Delete the newest decoder, so that the next run makes it again."""
        self.store.delete(f"artifacts/decoder/{self.fingerprint}/manifest.json")
        self.store.delete_all(f"artifacts/decoder/{self.fingerprint}/")


def wrong_tokens_are_refused(team: Rehearsal) -> str:
    """Nobody gets in with the wrong credential, or with none."""
    cluster = team.cluster
    wrong = {"Authorization": "Bearer wrong"}
    experiments = f"{cluster.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1"
    flows = f"{cluster.prefect_url}/work_pools/filter"
    tried = {
        "MLflow without a login": httpx.get(experiments).status_code,
        "MLflow with a wrong one": httpx.get(experiments, auth=("admin", "wrong")).status_code,
        "Prefect without a login": httpx.post(flows, json={}).status_code,
        "Prefect with a wrong one": httpx.post(flows, json={}, auth=("genpipe", "wrong")).status_code,
        "Ray's dashboard without a token": httpx.get(f"{cluster.ray_url}/api/jobs/").status_code,
        "Ray's dashboard with a wrong one": httpx.get(f"{cluster.ray_url}/api/jobs/", headers=wrong).status_code,
        "S3 without a key": httpx.get(f"{cluster.s3.endpoint}/{BUCKET}").status_code,
    }
    let_in = {what: status for what, status in tried.items() if status not in (401, 403)}
    assert not let_in, let_in
    assert cluster.postgres.refuses("wrong"), "PostgreSQL takes a wrong password"
    good = dict(cluster.laptop)
    for name, value, command in (
        ("RAY_AUTH_TOKEN", "0" * 64, ["stage", "shard", str(team.config)]),
        ("PREFECT_API_AUTH_STRING", "genpipe:wrong", ["deployments"]),
        ("AWS_SECRET_ACCESS_KEY", "wrong", ["plan", str(team.config)]),
        ("MLFLOW_TRACKING_PASSWORD", "wrong", ["run", str(team.config)]),
    ):
        cluster.laptop = good | {name: value}
        done = cluster.genpipe(*command, check=False)
        cluster.laptop = good
        said = (done.stderr or done.stdout).strip()
        assert done.returncode and "Traceback" not in said, f"{name}: {done.returncode} {said}"
        print(f"      {name}: {' '.join(said.split())[:200]}")
    return f"{len(tried) + 1} requests and 4 commands"


def a_schedule_runs_the_pipeline(team: Rehearsal) -> str:
    """A deployment on a one-minute schedule runs the tiny pipeline from a folder on S3."""
    print(team.cluster.genpipe("deploy", str(team.config), "--cron", "* * * * *", "--overlap", "skip").stdout)
    run = team.next_completed()
    made = team.manifests()
    assert len(made) == 10, made
    team.remember_decoder(made)
    return f"{len(made)} stages in {run.seconds:.0f} s"


def nothing_is_made_twice(team: Rehearsal) -> str:
    """The next scheduled run finds everything cached, and starts no job."""
    made, jobs = team.manifests(), len(team.cluster.jobs())
    run = team.next_completed()
    assert team.manifests() == made and len(team.cluster.jobs()) == jobs
    return f"in {run.seconds:.0f} s"


def new_pictures_are_noticed(team: Rehearsal) -> str:
    """Three pictures are added; a stage by hand shares the job of the scheduled run; two ranks train on two nodes."""
    before = team.manifests()
    for number in range(3):
        picture = draw_shape("circle", rgb=(90 * number, 200, 120), radius=10)
        path = team.cluster.folder / f"new-{number}.png"
        picture.save(path)
        team.pictures.write(f"{path.stem}.txt", f"a new circle, number {number}\n".encode())
        team.pictures.write(path.name, path.read_bytes())
    addresses = team.await_training()
    assert len(set(addresses)) == 2, addresses
    command = [str(BIN / "genpipe"), "stage", "decoder", str(team.config)]
    environment = team.cluster.environment("laptop") | team.cluster.laptop
    with (team.cluster.folder / "by-hand.log").open("wb") as log:
        by_hand = subprocess.Popen(command, env=environment, cwd=team.cluster.folder, stdout=log, stderr=log)
    run = team.next_completed()
    assert by_hand.wait(120) == 0, (team.cluster.folder / "by-hand.log").read_text()
    made = sorted(set(team.manifests()) - set(before))
    assert len(made) == 10, made
    team.remember_decoder(made)
    assert team.decoder_jobs() == 1, [job["submission_id"] for job in team.cluster.jobs()]
    return f"{len(made)} stages in {run.seconds:.0f} s, ranks on {' and '.join(addresses)}, 1 job for two who asked"


def a_node_is_cut_off(team: Rehearsal) -> str:
    """A node's link goes down in mid-training; the run ends by itself, with the same weights."""
    team.forget_decoder()
    lost = team.await_training()[-1]
    [host] = [node for node in team.cluster.nodes if node.address == lost]
    at, cut = team.trained(), time.monotonic()
    host.unplug()
    wait_until(lambda: lost not in team.cluster.rank_addresses(), "the loss to be noticed", seconds=300)
    noticed = time.monotonic() - cut
    run = team.next_completed()
    assert team.weights() == team.digest, "the weights are others"
    host.kill()
    team.cluster.nodes.remove(host)
    team.cluster.nodes.append(team.cluster.add_node())
    return f"cut after {at} samples, noticed after {noticed:.0f} s, done after {run.seconds:.0f} s"


def a_dead_workers_job_is_adopted(team: Rehearsal) -> str:
    """The Prefect worker's machine dies; the job goes on, and the next run, on another machine, adopts it."""
    team.forget_decoder()
    jobs = team.decoder_jobs()
    team.await_training()
    [dead] = [run.id for run in team.flow_runs() if run.state == "RUNNING"]
    killed = time.monotonic()
    team.cluster.worker_host.kill()
    team.cluster.worker_host = team.cluster.start_worker()
    team.seen.add(dead)
    team.next_completed()
    seconds = time.monotonic() - killed
    assert team.decoder_jobs() == jobs + 1, "the job was not adopted"
    assert team.weights() == team.digest, "the weights are others"
    state = next(run.state for run in team.flow_runs() if run.id == dead)
    assert state == "CRASHED", f"the dead run is {state}"
    return f"the next run was done {seconds:.0f} s after"


def a_cancel_stops_the_job(team: Rehearsal) -> str:
    """A cancel by Prefect's API stops the Ray job."""
    team.cluster.genpipe("deploy", str(team.config), "stages.decoder.train.samples=10000000")
    team.cluster.genpipe("deploy", "team", "--now")
    team.await_training()
    [run] = [run for run in team.flow_runs() if run.state == "RUNNING"]
    begun = time.monotonic()
    team.prefect(f"flow_runs/{run.id}/set_state", {"state": {"type": "CANCELLING"}, "force": True})
    wait_until(lambda: not team.running_jobs(), "the job to stop", seconds=120)
    seconds = time.monotonic() - begun
    states = Counter[str]()

    def ended() -> bool:
        states.update([next(each.state for each in team.flow_runs() if each.id == run.id)])
        return "CANCELLED" in states

    wait_until(ended, f"the flow run to be cancelled: {states}", seconds=120)
    assert seconds <= CANCEL_SECONDS, f"after {seconds:.1f} s"
    return f"after {seconds:.1f} s"


def a_backup_restores(team: Rehearsal) -> str:
    """PostgreSQL and S3 lose their disks; with what was backed up all records are back, and nothing is made anew."""
    cluster = team.cluster
    cluster.genpipe("deploy", str(team.config), "--cron", "* * * * *", "--overlap", "skip")
    team.pause()
    login = ("somebody", secrets.token_hex(16))
    team.mlflow("users/create", username=login[0], password=login[1])

    def kept() -> dict[str, Any]:
        return {
            "MLflow's runs": team.mlflow_runs(login=login),
            "Prefect's runs": team.flow_runs(),
            "artifacts": team.manifests(),
            "objects": team.objects(),
        }

    before, jobs = kept(), len(cluster.jobs())
    backup, restore = _administration()
    folder = cluster.folder / "backup"
    folder.mkdir()
    begun = time.monotonic()
    cluster.administer(backup, folder)
    backed_up = time.monotonic()
    cluster.lose_disks()
    assert not team.manifests(), "the disks are not lost"
    lost = time.monotonic()
    cluster.administer(restore, folder)
    cluster.start_again()
    restored = time.monotonic()
    after = kept()
    others = [what for what, there in before.items() if there != after[what]]
    assert not others, f"not as before: {', '.join(others)}"
    team.seen |= {run.id for run in team.flow_runs()}
    cluster.genpipe("deploy", "team", "--resume")
    run = team.next_completed()
    assert team.manifests() == before["artifacts"] and len(cluster.jobs()) == jobs, "something was made anew"
    team.pause()
    sizes = ", ".join(f"{len(there)} {what}" for what, there in before.items())
    times = f"backed up in {backed_up - begun:.0f} s, restored and started in {restored - lost:.0f} s"
    return f"{sizes}; {times}; the next scheduled run made nothing in {run.seconds:.0f} s"


def _administration() -> tuple[str, str]:
    """The commands of infra/README.md that back up, and those that restore."""
    section = (ROOT / "infra/README.md").read_text().partition("## Upgrades, backups, restore")[2]
    blocks = re.findall(r"(?:^    .+\n)+", section, flags=re.MULTILINE)
    access, backup, restore = (textwrap.dedent(block) for block in blocks)
    return access + backup, access + restore


def mlflow_shows_the_runs(team: Rehearsal) -> str:
    """MLflow's page shows the scheduled runs, none of them open (a screenshot)."""
    cluster = team.cluster
    runs = [run["info"] for run in team.mlflow_runs()]
    statuses = Counter(run["status"] for run in runs)
    assert "RUNNING" not in statuses, statuses
    newest = next(run["run_name"] for run in runs if run["run_name"].startswith("team "))
    login = base64.b64encode(":".join(cluster.mlflow_login).encode()).decode()
    url = f"{cluster.mlflow_url}/#/experiments/{runs[0]['experiment_id']}/runs"
    picture = cluster.folder / "mlflow.png"
    with closing(Browser(url, cluster.folder / "chromium", headers={"Authorization": f"Basic {login}"})) as browser:
        page = "document.body && document.body.innerText || ''"
        wait_until(lambda: newest in browser.run(page), "MLflow's page to show the newest run")
        picture.write_bytes(browser.screenshot())
    return f"{dict(statuses)}; {picture}"


CLAIMS: dict[str, Callable[[Rehearsal], str]] = {
    "a wrong token is refused everywhere": wrong_tokens_are_refused,
    "a schedule runs the pipeline from S3": a_schedule_runs_the_pipeline,
    "the next run makes nothing": nothing_is_made_twice,
    "new pictures are noticed, a job is shared, two nodes train": new_pictures_are_noticed,
    "a node is cut off": a_node_is_cut_off,
    "a dead worker's job is adopted": a_dead_workers_job_is_adopted,
    "a cancel stops the job": a_cancel_stops_the_job,
    "a backup restores": a_backup_restores,
    "MLflow shows the runs": mlflow_shows_the_runs,
}
