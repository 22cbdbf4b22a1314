"""What a run leans on, real and breakable: an S3 server behind a proxy, an MLflow server, a small disk, a clock."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from chaos import processes
from hosts import Missing
from seaweed import Seaweed, free_ports

REFUSAL = b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Please reduce your \
request rate.</Message></Error>"""


class Proxy:
    """A proxy before a server: it passes bytes on or, while `refusing`, answers every request with 503."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.refusing = False
        self.refused = 0
        self.open: set[socket.socket] = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        """Answer 503 from now on, and cut what is under way."""
        self.refusing = True
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self.refusing:
                self._answer_503(client)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                self.open |= {client, server}
                try:
                    back = threading.Thread(target=_pass_on, args=(server, client), daemon=True)
                    back.start()
                    _pass_on(client, server)
                    back.join()
                finally:
                    self.open -= {client, server}

    def _answer_503(self, client: socket.socket) -> None:
        client.settimeout(5)
        head = b""
        while b"\r\n\r\n" not in head and (data := client.recv(65536)):
            head += data
        self.refused += 1
        lines = [b"HTTP/1.1 503 Slow Down", b"Content-Type: application/xml", b"Connection: close"]
        head = b"\r\n".join([*lines, f"Content-Length: {len(REFUSAL)}".encode(), b"", b""])
        client.sendall(head + REFUSAL)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):  # the body, which a reset would make the client's trouble
            pass


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class S3:
    """SeaweedFS behind a proxy, through which the runs go; the harness looks at the server itself."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.server = Seaweed(folder)
        self.start()
        os.environ.update(self.server.environment())
        self.proxy = Proxy(self.server.ports[-1])

    def start(self) -> None:
        """Start the server, at first or again."""
        self.server.start()
        processes.set_apart(self.server.process.pid)

    def environment(self) -> dict[str, str]:
        """What leads a run to the proxy."""
        return self.server.environment(endpoint=self.proxy.endpoint)

    def close(self) -> None:
        self.server.kill()


class Mlflow:
    """An MLflow server on loopback with its SQLite file, which can be killed, stopped and started again."""

    START_SECONDS = 90.0

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        [self.port] = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = f"sqlite:///{folder}/mlflow.db"
        self.start()

    def start(self) -> None:
        """Return once it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        places = ["--backend-store-uri", self.database, "--artifacts-destination", str(self.folder / "files")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *places, "--workers", "1"], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        processes.set_apart(self.process.pid)
        deadline = time.monotonic() + self.START_SECONDS
        while not self._answers():
            assert time.monotonic() < deadline, f"MLflow is not ready after {self.START_SECONDS} s"
            time.sleep(0.2)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.kill()

    def _answers(self) -> bool:
        with suppress(OSError, HTTPException), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
            return bool(answer.status == 200)
        return False


class Disk:
    """A file system of a few megabytes (tmpfs), which can be filled to the last byte and emptied again."""

    def __init__(self, folder: Path, *, megabytes: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.ballast = folder / "ballast"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            raise Missing(f"a small disk needs mount(8) with root's rights: {done.stderr.strip()}")

    def fill(self) -> None:
        """Leave no byte free."""
        with self.ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Give back what `fill` took."""
        self.ballast.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *ahead;

__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY) : -1;
    if (file < 0) return;
    void *shared = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED) ahead = shared;
    close(file);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *ahead;
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec t;
    int failed = clock_gettime(CLOCK_REALTIME, &t);
    now->tv_sec = t.tv_sec; now->tv_usec = t.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *now) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (now) *now = t.tv_sec;
    return t.tv_sec;
}
"""


class Clock:
    """The wall clock of a run's processes alone: a preloaded library adds to it what a shared page says.

    The machine's own clock is left as it is, and so is the monotonic one, as when a real wall clock is set.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        compiler = shutil.which("cc")
        if compiler is None:
            raise Missing("a clock of the run's own needs a C compiler (cc)")
        (folder / "clock.c").write_text(SHIM)
        self.library = folder / "clock.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", self.library, folder / "clock.c"], check=True)
        self.page = folder / "ahead"
        self.page.write_bytes(struct.pack("q", 0))
        with self.page.open("r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 8)

    def environment(self) -> dict[str, str]:
        """What gives a run this clock."""
        return {"LD_PRELOAD": str(self.library), "CHAOS_CLOCK": str(self.page)}

    def set_ahead(self, seconds: int) -> None:
        """Set the clock forward, or back, at once for every process that has it."""
        self.shared[:] = struct.pack("q", seconds)

    def close(self) -> None:
        self.shared.close()
