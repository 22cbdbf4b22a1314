"""The faults: what strikes, when, and where the run then is. Each is a line of FAULTS.

A strike lasts as long as the fault does: whatever it took away is there again when it returns.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import psutil
from chaos import processes
from chaos.cluster import Hosts, drain_head
from chaos.lab import Case, Launcher
from chaos.moments import Missed, Moment, wait_for_moment
from chaos.services import Disk

KILL, TERM, INT, STOP, CONT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGCONT
LIFE: tuple[Moment, ...] = ("training", "starting", "saving", "committing", "committed")
TRAINING: tuple[Moment, ...] = ("training", "saving")
S3_MOMENTS: tuple[Moment, ...] = ("training",)


class Fault(NamedTuple):
    """What strikes a run (`strike`), how it was started, and at which moments (in turn) it is struck."""

    launcher: Launcher
    moments: tuple[Moment, ...]
    strike: Callable[[Case], object]
    place: Callable[[Case], object] = Case.with_inputs
    says: str = ""
    """What one of the commands must have said (a regular expression)."""
    seconds: float = 0.0
    """How long a command may take after the strike; 0: what its launcher may."""


# Signals


def send(case: Case, *, role: str, number: signal.Signals) -> None:
    """Send a signal to one process of a role, drawn."""
    found = processes.of_role(role)
    if not found:
        raise ProcessLookupError(f"no {role} is running")
    case.random.choice(found).send_signal(number)


def send_command(case: Case, *, number: signal.Signals) -> None:
    """Send a signal to the command alone, as `kill` does."""
    case.started[-1].send_signal(number)


def send_group(case: Case, *, number: signal.Signals) -> None:
    """Send a signal to the command's process group, as a terminal does."""
    os.killpg(case.started[-1].pid, number)


def kill_everything(case: Case) -> None:
    """Kill every process of the run at once: the machine lost its power."""
    found = processes.family()
    for number in (STOP, KILL):  # stopped first, none sees another die
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


# Checkpoints


def damage(case: Case, *, how: Callable[[Case, str], None], all_: bool = False, with_: str = "") -> None:
    """Kill the run (or a process of the role `with_`) and damage its newest checkpoint, or all of them."""
    victims = [case.random.choice(processes.of_role(with_))] if with_ else processes.family()
    for process in victims:
        processes.stop(process)  # so that it saves no other meanwhile
    manifests = [key for key in case.keys("work/decoder/") if key.endswith("/manifest.json") and "/checkpoints/" in key]
    folders = sorted(key.rpartition("/")[0] for key in manifests)
    for folder in folders if all_ else folders[-1:]:
        how(case, folder)
    for process in victims:
        process.send_signal(KILL)


def corrupt(case: Case, folder: str) -> None:
    """Flip a bit in the middle of the largest file."""
    key = _largest(case, folder)
    data = bytearray(case.storage().read(key))
    data[case.random.randrange(len(data))] ^= 1 << case.random.randrange(8)
    case.storage().write(key, bytes(data))


def truncate(case: Case, folder: str) -> None:
    """Cut the largest file short."""
    key = _largest(case, folder)
    data = case.storage().read(key)
    case.storage().write(key, data[: case.random.randrange(len(data))])


def lose_file(case: Case, folder: str) -> None:
    """Delete the largest file."""
    case.storage().delete(_largest(case, folder))


def lose(case: Case, folder: str) -> None:
    """Delete the whole folder."""
    case.storage().delete_all(f"{folder}/")


def break_manifest(case: Case, folder: str) -> None:
    """Cut the manifest short."""
    key = f"{folder}/manifest.json"
    data = case.storage().read(key)
    case.storage().write(key, data[: case.random.randrange(len(data))])


def _largest(case: Case, folder: str) -> str:
    return max(case.storage().list(f"{folder}/"), key=lambda entry: entry.size).key


# Services


def s3_refuses(case: Case, *, seconds: float) -> None:
    """S3 answers 503 for so long."""
    proxy = case.lab.s3.proxy
    proxy.refuse()
    time.sleep(seconds)
    proxy.refusing = False
    assert proxy.refused, "nobody asked S3 meanwhile"
    proxy.refused = 0


def s3_dies(case: Case, *, seconds: float) -> None:
    """S3 is killed, and started again after so long."""
    case.lab.s3.server.kill()
    time.sleep(seconds)
    case.lab.s3.start()


def mlflow_dies(case: Case, *, seconds: float) -> None:
    """MLflow is killed, and started again after so long."""
    case.lab.mlflow.kill()
    time.sleep(seconds)
    case.lab.mlflow.start()


def mlflow_hangs(case: Case, *, seconds: float) -> None:
    """MLflow takes connections and answers none of them for so long."""
    case.lab.mlflow.send(STOP)
    time.sleep(seconds)
    case.lab.mlflow.send(CONT)


def mlflow_stays_away(case: Case) -> None:
    """MLflow is killed, and is back only after the run, whose records the next one hands in."""
    case.lab.mlflow.kill()
    case.wait(seconds=300)
    case.lab.mlflow.start()
    case.start()


def on_s3(case: Case) -> None:
    case.move_to_s3()
    case.with_inputs()


def on_mlflow_server(case: Case) -> None:
    case.track_on_server()
    case.with_inputs()


# The machine


def on_small_disk(case: Case) -> None:
    """The store on a disk of its own, of a few megabytes."""
    disk = Disk(case.folder / "disk", megabytes=16)
    case.closers.append(disk.close)
    case.disk = disk
    case.move_to(str(disk.folder / "store"))
    case.with_inputs()


def with_small_tmp(case: Case) -> None:
    """The folder of temporary files on a disk of its own."""
    disk = Disk(case.folder / "disk", megabytes=16)
    case.closers.append(disk.close)
    case.disk = disk
    case.environment["TMPDIR"] = str(disk.folder)
    case.with_inputs()


def fill_disk(case: Case, *, seconds: float) -> None:
    """The disk is full for so long, or until the run has ended of it."""
    assert case.disk is not None
    case.disk.fill()
    deadline = time.monotonic() + seconds
    while case.running() and time.monotonic() < deadline:
        time.sleep(0.1)
    case.disk.free()


def with_clock(case: Case) -> None:
    """A wall clock of the run's own."""
    case.lab.clock.set_ahead(0)
    case.environment |= case.lab.clock.environment()
    case.with_inputs()


def jump(case: Case, *, hours: float) -> None:
    """Set the run's wall clock forward or back, and leave it so."""
    case.lab.clock.set_ahead(round(3600 * hours))


# A process beside the ranks


def with_validator(case: Case) -> None:
    """Validation in a process of its own, for which the ranks leave room."""
    case.settings["stages"]["decoder"]["resources"] |= {"cpus": 0.5, "validation": {"cpus": 0.5}}
    case.write_settings()
    case.with_inputs()


# Two at once


def start_another(case: Case) -> None:
    """Give the same command again while the first is at work."""
    case.start()


def overtake_a_stopped_driver(case: Case) -> None:
    """Stop the run as if its machine slept, start another, and wake the first when that one is at work or done."""
    stopped = processes.family()
    for process in stopped:
        process.send_signal(STOP)
    before = case.progress() or 0
    other = case.start()
    deadline = time.monotonic() + 100
    while other.poll() is None and (case.progress() or 0) <= before and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(case.random.uniform(0, 1.0))
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(CONT)


# Nodes of a cluster


def on_two_hosts(case: Case) -> None:
    """Ray on two hosts, of which the second, in a network of its own, has the CPUs for the ranks."""
    case.hosts = Hosts(case)
    case.closers.append(case.hosts.close)
    case.settings["ray"] = {"address": case.hosts.dashboard}
    case.environment |= case.hosts.environment
    case.write_settings()
    case.with_inputs()


def lose_node(case: Case, *, how: str) -> None:
    """Lose the second host in one way or another; another takes its place, as a cluster's manager would have it."""
    assert case.hosts is not None
    getattr(case.hosts, how)()
    case.hosts.add_node()


def preempt_locally(case: Case) -> None:
    """Give notice that the machine of the local Ray is about to be taken away.

    Ray's command for that takes seconds to start. Raises Missed where the run was over before.
    """
    try:
        drain_head(case)
    except AssertionError:
        if case.started[-1].poll() is not None:
            raise Missed("it was over before Ray heard of the preemption") from None
        raise


ALONE: dict[str, Fault] = {
    "alone: SIGKILL": Fault("alone", LIFE, partial(send_command, number=KILL)),
    "alone: SIGTERM": Fault("alone", LIFE, partial(send_command, number=TERM)),
    "alone: SIGINT": Fault("alone", LIFE, partial(send_group, number=INT)),
    "checkpoint: corrupted": Fault("alone", TRAINING, partial(damage, how=corrupt), says="damaged"),
    "checkpoint: truncated": Fault("alone", TRAINING, partial(damage, how=truncate), says="damaged"),
    "checkpoint: file deleted": Fault("alone", TRAINING, partial(damage, how=lose_file), says="damaged"),
    "checkpoint: deleted": Fault("alone", TRAINING, partial(damage, how=lose)),
    "checkpoint: manifest cut short": Fault("alone", TRAINING, partial(damage, how=break_manifest), says="damaged"),
    "checkpoint: all corrupted": Fault("alone", TRAINING, partial(damage, how=corrupt, all_=True), says="damaged"),
    "disk: full for 3 s": Fault("alone", TRAINING, partial(fill_disk, seconds=3), on_small_disk),
    "disk: full": Fault("alone", TRAINING, partial(fill_disk, seconds=60), on_small_disk),
    "disk: /tmp full": Fault("alone", TRAINING, partial(fill_disk, seconds=60), with_small_tmp),
    "clock: an hour ahead": Fault("alone", LIFE[:4], partial(jump, hours=1), with_clock),
    "clock: an hour back": Fault("alone", LIFE[:4], partial(jump, hours=-1), with_clock),
    "S3: 503 for 10 s": Fault("alone", S3_MOMENTS, partial(s3_refuses, seconds=10), on_s3),
    "S3: killed for 30 s": Fault("alone", S3_MOMENTS, partial(s3_dies, seconds=30), on_s3),
    "two drivers at once": Fault("alone", ("training", "starting", "saving"), start_another),
    "driver stopped and overtaken": Fault("alone", TRAINING, overtake_a_stopped_driver, seconds=180),
    "torchrun: SIGKILL of a rank": Fault("torchrun", LIFE, partial(send, role="rank", number=KILL)),
    "torchrun: SIGSTOP of a rank": Fault("torchrun", ("training",), partial(send, role="rank", number=STOP)),
    "torchrun: SIGKILL of torchrun": Fault("torchrun", TRAINING, partial(send_command, number=KILL)),
    "torchrun: SIGTERM": Fault("torchrun", TRAINING, partial(send_command, number=TERM)),
}


def _kill(role: str, *moments: Moment) -> Fault:
    return Fault("pipeline", moments or TRAINING, partial(send, role=role, number=KILL))


PIPELINE: dict[str, Fault] = {
    "rank: SIGKILL": _kill("rank", *TRAINING, "committing"),
    "rank: SIGSTOP": Fault("pipeline", ("training",), partial(send, role="rank", number=STOP)),
    "rank: SIGTERM": Fault("pipeline", TRAINING, partial(send, role="rank", number=TERM)),
    "rank: SIGKILL, newest checkpoint corrupted": Fault(
        "pipeline", TRAINING, partial(damage, how=corrupt, with_="rank")
    ),
    "driver: SIGKILL": _kill("driver", *LIFE),
    "driver: SIGTERM": Fault("pipeline", TRAINING, partial(send, role="driver", number=TERM)),
    "flow: SIGKILL": _kill("flow", *LIFE),
    "flow: SIGINT": Fault("pipeline", LIFE, partial(send_group, number=INT)),
    "flow: SIGTERM": Fault("pipeline", LIFE, partial(send_command, number=TERM)),
    "raylet: SIGKILL": _kill("raylet"),
    "GCS: SIGKILL": _kill("gcs"),
    "dashboard: SIGKILL": _kill("dashboard"),
    "dashboard agent: SIGKILL": _kill("dashboard agent"),
    "train controller: SIGKILL": _kill("train controller"),
    "job supervisor: SIGKILL": _kill("job supervisor"),
    "validator: SIGKILL": Fault(
        "pipeline", ("validating",), partial(send, role="validator", number=KILL), with_validator
    ),
    "validator: SIGSTOP": Fault(
        "pipeline", ("validating",), partial(send, role="validator", number=STOP), with_validator
    ),
    "head: SIGKILL": _kill("ray head"),
    "Prefect's server: SIGKILL": _kill("prefect server"),
    "data worker: SIGKILL": Fault(
        "pipeline", ("mapping",), partial(send, role="data worker", number=KILL), lambda case: case.with_inputs("shard")
    ),
    "everything: SIGKILL": Fault("pipeline", LIFE, kill_everything),
    "preemption notice": Fault("pipeline", ("training",), preempt_locally),
    "MLflow: killed for 10 s": Fault("pipeline", TRAINING, partial(mlflow_dies, seconds=10), on_mlflow_server),
    "MLflow: silent for 15 s": Fault("pipeline", TRAINING, partial(mlflow_hangs, seconds=15), on_mlflow_server),
    "MLflow: killed, back after the run": Fault("pipeline", ("training",), mlflow_stays_away, on_mlflow_server),
    "pipeline's disk: full": Fault("pipeline", TRAINING, partial(fill_disk, seconds=60), on_small_disk),
    "pipeline's clock: an hour ahead": Fault("pipeline", TRAINING, partial(jump, hours=1), with_clock),
    "two runs at once": Fault("pipeline", ("starting", "training"), start_another),
    "second node: SIGKILL": Fault("pipeline", TRAINING, partial(lose_node, how="kill"), on_two_hosts),
    "second node: link down": Fault("pipeline", ("training",), partial(lose_node, how="unplug"), on_two_hosts),
    "second node: preempted": Fault("pipeline", ("training",), partial(lose_node, how="preempt"), on_two_hosts),
}

FAULTS: dict[str, Fault] = ALONE | PIPELINE


def strike(case: Case, fault: Fault, *, turn: int) -> str:
    """Wait for the fault's moment, the `turn`-th of them, and strike; what the moment was."""
    moment = wait_for_moment(case, fault.moments[turn % len(fault.moments)])
    fault.strike(case)
    return moment
