"""Fetch untrusted URLs: bounded in time, size, redirects and number, and never from private networks."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import itertools
import random
import re
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import aiohttp
from pydantic import Field

from genpipe.config import Config

AddrInfo = tuple[Any, Any, int, str, tuple[Any, ...]]  # as socket.getaddrinfo gives it
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
NAT64 = ipaddress.ip_network("64:ff9b::/96")
INTERNET_V6 = ipaddress.ip_network("2000::/3")
PRIVATE = "leads to a private address"
# Directives of X-Robots-Tag that have a value after a colon, as a crawler's name has its directives.
VALUED_DIRECTIVES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


class FetchConfig(Config):
    """What one fetch may cost, and whom it may bother. No proxy is used.

    Names and redirects that lead to private addresses are refused unless `allow_private`, so that a foreign
    table cannot make the cluster read its own services.
    """

    concurrency: int = Field(64, ge=1, description="fetches under way at once in each worker")
    per_host: int = Field(8, ge=1, description="of them from one host")
    timeout: float = Field(30.0, gt=0, description="seconds for an attempt, from connecting to the last byte")
    retries: int = Field(2, ge=0, description="further attempts after a time-out, a lost connection, 429 or 5xx")
    max_bytes: int = Field(20 * 2**20, gt=0, description="a larger image is given up while it arrives")
    max_redirects: int = Field(5, ge=1, description="redirects that an attempt follows")
    user_agent: str = Field("genpipe", min_length=1, description="add a contact: owners of servers look for one")
    disallowed: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex"),
        description="directives of X-Robots-Tag that keep an image out; an empty list ignores the header",
    )
    allow_private: bool = Field(False, description="also fetch from private and loopback addresses")


@dataclass(frozen=True)
class Failure:
    """Why there is no content: a short code and the detail."""

    reason: str
    detail: str


class _Passing(Exception):
    """A failure that may pass, and after how many seconds the server wants to be asked again."""

    def __init__(self, failure: Failure, *, after: float = 0.0) -> None:
        self.failure, self.after = failure, after


class Fetcher:
    """Fetches on an event loop in a thread of its own, which lives as long as the `with` block."""

    def __init__(self, cfg: FetchConfig) -> None:
        self.cfg = cfg
        self._loop = asyncio.new_event_loop()
        # Names are resolved by its threads: a name that takes its time must cost no other fetch its own.
        self._loop.set_default_executor(ThreadPoolExecutor(cfg.concurrency, "resolve"))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def __enter__(self) -> Fetcher:
        self._thread.start()
        self._session = asyncio.run_coroutine_threadsafe(self._open_session(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, url: str) -> Future[bytes | Failure]:
        """Start a fetch; its content, or why there is none after all attempts. Space around a URL is no part of it."""
        return asyncio.run_coroutine_threadsafe(self._fetch(url.strip()), self._loop)

    async def _open_session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0,  # the semaphores' task: waiting in the connector would count as time of the fetch
            ttl_dns_cache=300,
            socket_factory=None if self.cfg.allow_private else _public_socket,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": self.cfg.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=self.cfg.timeout),
        )

    async def _close(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._session.close()

    async def _fetch(self, url: str) -> bytes | Failure:
        try:
            parsed = urlsplit(url)
            host = parsed.hostname
        except ValueError as error:
            return Failure("bad_url", str(error))
        if parsed.scheme not in ("http", "https") or not host:
            return Failure("bad_url", "not an http(s) URL")
        of_host = self._hosts.get(host) or self._hosts.setdefault(host, asyncio.Semaphore(self.cfg.per_host))
        for attempt in itertools.count():
            try:
                async with of_host, self._slots:
                    return await self._attempt(url)
            except _Passing as passing:
                if attempt == self.cfg.retries:
                    return passing.failure
                backoff = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1)
                await asyncio.sleep(max(backoff, min(passing.after, LONGEST_PAUSE)))
        raise AssertionError("counts without end")

    async def _attempt(self, url: str) -> bytes | Failure:
        """One request. Raises _Passing for what another attempt may mend."""
        try:
            async with self._session.get(url, max_redirects=self.cfg.max_redirects) as response:
                return await self._content(response)
        except TimeoutError:
            raise _Passing(Failure("timeout", f"not there after {self.cfg.timeout} s")) from None
        except aiohttp.TooManyRedirects:
            return Failure("too_many_redirects", f"more than {self.cfg.max_redirects}")
        except (aiohttp.NonHttpUrlClientError, ValueError) as error:  # also of a redirect
            return Failure("bad_url", f"not a valid http(s) URL: {error}")
        except aiohttp.ClientSSLError as error:
            return Failure("tls", str(error))
        except (aiohttp.ClientError, OSError) as error:
            if PRIVATE in str(error):
                return Failure("private_address", f"{error}; fetch.allow_private lets it in")
            raise _Passing(Failure("connection", f"{type(error).__name__}: {error}")) from None

    async def _content(self, response: aiohttp.ClientResponse) -> bytes | Failure:
        if response.status != 200:
            failure = Failure(f"http_{response.status}", f"{response.status} {response.reason}")
            if response.status in RETRIED:
                raise _Passing(failure, after=pause_asked(response.headers.get("Retry-After", "")))
            return failure
        for answer in (*response.history, response):
            directives = robots_directives(answer.headers.getall("X-Robots-Tag", []), agent=self.cfg.user_agent)
            if forbidden := sorted(directives & set(self.cfg.disallowed)):
                return Failure("noai", f"X-Robots-Tag: {', '.join(forbidden)}")
        too_large = Failure("too_large", f"more than {self.cfg.max_bytes} bytes")
        if (response.content_length or 0) > self.cfg.max_bytes:
            return too_large
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > self.cfg.max_bytes:
                return too_large
        return bytes(content)


def pause_asked(retry_after: str) -> float:
    """The seconds that a Retry-After header asks for, a number or a date (RFC 9110, section 10.2.3); 0 for neither."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no date, or one without a time zone
        return 0.0


def robots_directives(values: Iterable[str], *, agent: str) -> set[str]:
    """The directives of X-Robots-Tag headers, in lower case, that are for everybody or for `agent`.

    A header is `noai, noindex` or `somebot: noai, otherbot: noindex`; an agent's name is the first word of its
    User-Agent up to a slash.
    """
    me = re.split(r"[/\s]", agent, maxsplit=1)[0].lower()
    found: set[str] = set()
    for value in values:
        addressee = ""
        for item in value.lower().split(","):
            name, colon, rest = (text.strip() for text in item.partition(":"))
            if colon and name not in VALUED_DIRECTIVES:
                addressee, name = name, rest
            if addressee in ("", "*", me):
                found.add(name)
    return found


def _public_socket(address: AddrInfo) -> socket.socket:
    """A socket for an address of the public internet; made for each connection, whatever led to it."""
    family, kind, protocol, _, where = address
    ip = ipaddress.ip_address(str(where[0]).partition("%")[0])
    if not all(map(_is_public, (ip, *_embedded(ip)))):
        raise OSError(errno.EACCES, f"{PRIVATE}, {ip}")
    return socket.socket(family, kind, protocol)


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the internet's: of IPv6 `is_global` has all that nobody reserved by name."""
    return ip.is_global and not ip.is_multicast and (ip.version == 4 or ip in INTERNET_V6 or ip in NAT64)


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address stands for, mapped, by 6to4 or by NAT64."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    nat64 = [ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)] if ip in NAT64 else []
    return [inner for inner in (ip.ipv4_mapped, ip.sixtofour) if inner] + nat64
