"""SeaweedFS behind a proxy that answers every request a little later, as an S3 service in a data center does."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from seaweed import Seaweed

SPAWN = multiprocessing.get_context("spawn")


class SlowS3:
    """A server, a proxy before it in a process of its own, and what has passed through that."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.server = Seaweed(folder)
        self.server.start()
        self.requests: Any = SPAWN.Value("q")
        self.bytes: Any = SPAWN.Value("q")
        ready = SPAWN.Queue()
        target = self.server.ports[-1]
        arguments = (target, seconds, self.requests, self.bytes, ready)
        self.proxy = SPAWN.Process(target=_proxy, args=arguments, daemon=True)
        self.proxy.start()
        self.endpoint = f"http://127.0.0.1:{ready.get()}"

    def environment(self) -> dict[str, str]:
        """The AWS settings that lead to the proxy."""
        return self.server.environment(endpoint=self.endpoint)

    def passed(self) -> tuple[int, int]:
        """The requests until now (twice where the client waits for a 100-continue), and the bytes of the answers."""
        return self.requests.value, self.bytes.value

    def close(self) -> None:
        """End both."""
        self.proxy.kill()
        self.server.kill()


@contextmanager
def slow_s3(folder: Path, *, seconds: float) -> Iterator[SlowS3]:
    """A server in `folder` whose every answer begins `seconds` late."""
    server = SlowS3(folder, seconds=seconds)
    try:
        yield server
    finally:
        server.close()


def _proxy(target: int, seconds: float, requests: Synchronized[int], sent: Synchronized[int], ready: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", target)
        asked = [False]

        async def ask() -> None:
            while data := await reader.read(2**18):
                asked[0] = True
                forth.write(data)
                await forth.drain()
            forth.close()

        async def answer() -> None:
            while data := await back.read(2**18):
                if asked[0]:
                    asked[0] = False
                    requests.value += 1
                    await asyncio.sleep(seconds)
                sent.value += len(data)
                writer.write(data)
                await writer.drain()
            writer.close()

        with suppress(OSError):
            await asyncio.gather(ask(), answer())

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)
        ready.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())
