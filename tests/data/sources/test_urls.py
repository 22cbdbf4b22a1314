"""URL tables, fetched from a real HTTP server that misbehaves in every way that servers do."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import parquet, png, put, read_all, source

from genpipe.data.samples import Reject, Sample
from genpipe.data.shards import write_rejects
from genpipe.data.sources.fetch import _public_socket, pause_asked, robots_directives
from genpipe.storage import open_storage


def answered(*headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((b"HTTP/1.1 200 OK", *headers, b"Connection: close", b"", body))


RAW = {
    "garbage": b"hello\r\n\r\n",
    "negative": answered(b"Content-Length: -5", body=png()),
    "long_header": answered(b"X-Long: " + b"x" * 100_000, body=png()),
    "many_headers": answered(*(b"X-%d: x" % number for number in range(50_000)), body=png()),
    "cookies": answered(b"Set-Cookie: =;;; a=b; domain=\xff", body=png()),
    "chunks": answered(b"Transfer-Encoding: chunked", body=b"zz\r\n"),
    "packed": answered(b"Content-Encoding: gzip", body=gzip.compress(png())),  # though nobody asked for it
    "not_packed": answered(b"Content-Encoding: gzip", body=png()),
    "bomb": answered(b"Content-Encoding: gzip", body=gzip.compress(bytes(10**8))),
}


class Web(ThreadingHTTPServer):
    """The server, and what it saw."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0), family: int = socket.AF_INET) -> None:
        self.address_family = family
        super().__init__(address, Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.delay: Callable[[str], float] = lambda path: 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass  # clients that give up are what is tested


class Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.agents.add(self.headers["User-Agent"])
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        time.sleep(self.server.delay(self.path))
        with self.server.lock:  # before the answer, on which the next request may follow
            self.server.under_way -= 1
        self.respond(self.path.strip("/"))

    def respond(self, path: str) -> None:
        name, _, rest = path.partition("/")
        if name == "ok":
            self.answer(200, png(int(rest)))
        elif name == "status":
            self.answer(int(rest), b"no image")
        elif name == "raw":
            self.wfile.write(RAW[rest])
            self.close_connection = True
        elif name == "foreign":  # in Latin-1, as the reason of the status and as where to go
            self.send_response(int(rest), "caf\xe9")
            self.send_header("Location", "file:///caf\xe9")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name == "moody":  # the given status twice, then an image
            first = self.server.asked[self.path] <= 2
            self.answer(int(rest), b"", **{"Retry-After": "0"}) if first else self.answer(200, png())
        elif name == "header":
            self.answer(200, png(), **{"X-Robots-Tag": rest.replace("_", " ")})
        elif name == "redirect":
            self.answer(302, b"", Location=rest.replace("__", "://"))
        elif name == "loop":
            self.answer(302, b"", Location="/loop")
        elif name == "page":
            self.answer(200, b"<html>Not found</html>", **{"Content-Type": "image/jpeg"})
        elif name == "empty":
            self.answer(200, b"")
        elif name == "silent":
            self.server.over.wait()
        elif name == "dripping":
            self.stream(piece=b"x", pause=0.05)
        elif name == "endless":
            self.stream(piece=bytes(10_000), pause=0.0)
        elif name == "broken":
            self.answer(200, png(), **{"Content-Length": "100000"})
            self.close_connection = True
        elif name == "hangup":
            self.close_connection = True
        elif name == "announced":
            self.answer(200, b"", **{"Content-Length": "999999999"})

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, *, piece: bytes, pause: float) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        while not self.server.over.wait(pause):
            self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def fetch(folder: object, urls: list[Any], **options: Any) -> list[Sample | Reject]:
    rows = [json.dumps({"url": url, "text": f"caption {number}"}) for number, url in enumerate(urls)]
    put(folder, {"t.jsonl": "\n".join(rows)})
    settings = {"allow_private": True, "retries": 0, "timeout": 20.0} | options
    return read_all(source("urls", folder, fetch=settings))


def reasons(items: list[Sample | Reject]) -> list[str]:
    return [item.reason if isinstance(item, Reject) else "fine" for item in items]


def test_samples_of_a_table(web: Web, store_uri: str) -> None:
    urls = [f"{web.url}/ok/{number}" for number in range(5)]
    columns = {"URL": urls, "TEXT": [f"caption {number}" for number in range(5)], "similarity": [0.3] * 5}
    put(store_uri, {"part-0.parquet": parquet(columns)})
    options = {"captions": "TEXT", "url": "URL", "meta": ["similarity"], "fetch": {"allow_private": True}}
    first, *others = read_all(source("urls", store_uri, **options))
    assert isinstance(first, Sample) and len(others) == 4
    assert (first.key, first.group, first.image) == ("part-0-00000000", urls[0], png(0))
    assert first.captions == ("caption 0",)
    assert first.meta == {"similarity": 0.3, "url": urls[0], "file_name": urls[0]}


def test_every_failure_is_a_reject_with_its_reason(web: Web, tmp_path: Path) -> None:
    cases = {
        "/ok/1": "fine",
        "/status/404": "http_404",
        "/status/410": "http_410",
        "/status/500": "http_500",
        "/header/noai": "noai",
        "/header/index,_follow": "fine",
        "/redirect//ok/2": "fine",
        "/redirect//header/noimageai": "noai",
        "/redirect//status/404": "http_404",
        "/redirect/file__/etc/hostname": "bad_url",
        "/redirect/gopher__host/": "bad_url",
        "/loop": "too_many_redirects",
        "/page/photo.jpg": "not_an_image",
        "/empty": "empty",
        "/broken": "connection",
        "/hangup": "connection",
        "/announced": "too_large",
        "/endless": "too_large",
        "/raw/garbage": "connection",
        "/raw/negative": "connection",
        "/raw/long_header": "connection",
        "/raw/many_headers": "connection",
        "/raw/cookies": "fine",
        "/raw/chunks": "connection",
        "/raw/packed": "fine",
        "/raw/not_packed": "connection",
        "/raw/bomb": "too_large",
    }
    found = fetch(tmp_path, [web.url + path for path in cases], max_bytes=10**6)
    assert dict(zip(cases, reasons(found), strict=True)) == cases
    assert all(
        item.source == web.url + path and item.detail
        for path, item in zip(cases, found, strict=True)
        if isinstance(item, Reject)
    )
    html = next(item for item in found if isinstance(item, Reject) and item.reason == "not_an_image")
    assert html.detail == "starts with b'<html>Not found<'"


def test_what_servers_say_in_other_encodings_stands_in_the_ledger(web: Web, tmp_path: Path) -> None:
    found = fetch(tmp_path / "table", [f"{web.url}/foreign/404", f"{web.url}/foreign/302"])
    write_rejects(tmp_path, [item for item in found if isinstance(item, Reject)], name="00000")
    rows = pq.read_table(tmp_path / "rejects-00000.parquet").to_pylist()
    assert [(row["reason"], row["detail"]) for row in rows] == [
        ("http_404", r"404 caf\udce9"),
        ("bad_url", r"not a valid http(s) URL: file:///caf\udce9"),
    ]


def test_urls_of_every_script_and_host(web: Web, tmp_path: Path) -> None:
    """As tables have them: not encoded, encoded, with space around, with a user, by an address of IPv6."""
    urls = [
        f"{web.url}/header/caf\u00e9",
        f"{web.url}/header/caf%C3%A9",
        f"{web.url}/header/a b",
        f" {web.url}/ok/1 \n",
    ]
    urls += [f"http://me:secret@127.0.0.1:{web.server_port}/ok/1", f"HTTP://LOCALHOST:{web.server_port}/ok/1#fragment"]
    with Web(("::1", 0), family=socket.AF_INET6) as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        urls.append(f"http://[::1]:{other.server_port}/ok/1")
        found = fetch(tmp_path, urls)
        other.shutdown()
    assert reasons(found) == ["fine"] * 7
    assert [item.meta["url"] for item in found if isinstance(item, Sample)] == urls
    assert web.asked["/header/caf%C3%A9"] == 2 and web.asked["/header/a%20b"] == 1 and web.asked["/ok/1"] == 3


def test_urls_that_are_none(tmp_path: Path) -> None:
    urls = ["ftp://host/a.png", "file:///etc/hostname", "no url", "http://", "http://[half", "", None, 5]
    urls += ["http://" + "x" * 70 + ".example/", "data:image/png;base64,AAAA", "ws://127.0.0.1/"]
    assert set(reasons(fetch(tmp_path, urls))) == {"bad_url"}
    assert reasons(fetch(tmp_path, ["http://no-such-host.invalid/a.png", "http://a b/"])) == ["connection"] * 2


def test_slow_servers_run_out_of_time(web: Web, tmp_path: Path) -> None:
    items = fetch(tmp_path, [f"{web.url}/silent", f"{web.url}/dripping", f"{web.url}/ok/1"], timeout=1.0)
    assert reasons(items) == ["timeout", "timeout", "fine"]


def test_names_that_are_slow_to_resolve_hold_nobody_up(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old tables are full of them. No server of names here takes its time, so the call that asks one does."""
    resolve = socket.getaddrinfo

    def slowly(host: str, *args: Any, **options: Any) -> Any:
        if not host.endswith(".invalid"):
            return resolve(host, *args, **options)
        time.sleep(0.5)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    dead = [f"http://{number}.invalid/a.png" for number in range(60)]
    items = fetch(tmp_path, [*dead, f"http://localhost:{web.server_port}/ok/1"], timeout=3.0)
    assert reasons(items) == ["connection"] * 60 + ["fine"]


def test_what_may_pass_is_tried_again(web: Web, tmp_path: Path) -> None:
    paths = ["/moody/503", "/moody/429", "/moody/500", "/status/502", "/status/404", "/broken"]
    items = fetch(tmp_path, [web.url + path for path in paths], retries=2)
    assert reasons(items) == ["fine", "fine", "fine", "http_502", "http_404", "connection"]
    assert [web.asked[path] for path in paths] == [3, 3, 3, 3, 1, 3]


def test_robots_headers_are_a_setting(web: Web, tmp_path: Path) -> None:
    urls = [f"{web.url}/header/{value}" for value in ("noai", "noindex", "genpipe:_noai", "otherbot:_noai", "nofollow")]
    assert reasons(fetch(tmp_path, urls)) == ["noai", "noai", "noai", "fine", "fine"]
    assert reasons(fetch(tmp_path, urls, disallowed=["noindex"])) == ["fine", "noai", "fine", "fine", "fine"]
    assert reasons(fetch(tmp_path, urls, disallowed=[])) == ["fine"] * 5
    assert reasons(fetch(tmp_path, urls, user_agent="OtherBot/2.0 (mail@host)"))[2:4] == ["fine", "noai"]
    assert web.agents == {"genpipe", "OtherBot/2.0 (mail@host)"}


@pytest.mark.parametrize(
    "values, expected",
    [
        (["noai, NoImageAI"], {"noai", "noimageai"}),
        (["noai", "noindex"], {"noai", "noindex"}),
        (["genpipe: noai, nofollow"], {"noai", "nofollow"}),
        (["otherbot: noai, noindex"], set()),
        (["otherbot: noai, genpipe: noindex"], {"noindex"}),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], {"unavailable_after", "noai"}),
        (["max-snippet: 5, otherbot: noai"], {"max-snippet"}),
        (["*: noai"], {"noai"}),
        (["", ":", ","], {""}),
    ],
)
def test_robots_directives(values: list[str], expected: set[str]) -> None:
    assert robots_directives(values, agent="genpipe/0.1 (mail@host)") - {""} == expected - {""}


def test_private_addresses_are_refused(web: Web, tmp_path: Path) -> None:
    port = web.server_port
    hosts = [
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        f"0.0.0.0:{port}",
        f"[::ffff:127.0.0.1]:{port}",
    ]
    hosts += ["169.254.169.254", "10.0.0.1", "[::1]"]
    items = fetch(tmp_path, [f"http://{host}/ok/1" for host in hosts], allow_private=False, retries=2)
    assert reasons(items) == ["private_address"] * len(hosts)
    assert not web.asked, "nobody was asked"


@pytest.mark.parametrize(
    "address, is_public",
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:0001::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("64:ff9b:1::7f00:1", False),
        ("fec0::1", False),
        ("::7f00:1", False),
    ],
)
def test_which_addresses_are_public(address: str, is_public: bool) -> None:
    """A socket is made anew for every connection, also behind a redirect: this is where all of them pass."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    info = (family, socket.SOCK_STREAM, 6, "", (address, 80))
    if is_public:
        _public_socket(info).close()
    else:
        with pytest.raises(OSError, match="leads to a private address"):
            _public_socket(info)


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(12)), st.integers(1, 8), st.integers(1, 5))
def test_the_order_is_the_tables_whatever_the_order_of_arrival(
    tmp_path_factory: pytest.TempPathFactory, ranks: list[int], concurrency: int, part_size: int
) -> None:
    server = Web()
    server.delay = lambda path: 0.002 * ranks[int(path.rsplit("/", 1)[-1])]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    folder = tmp_path_factory.mktemp("order")
    urls = [f"{server.url}/ok/{number}" for number in range(12)]
    put(folder, {"t.csv": "url,text\n" + "".join(f"{url},caption\n" for url in urls)})
    fetching = {"allow_private": True, "concurrency": concurrency, "per_host": concurrency}
    items = read_all(source("urls", folder, part_size=part_size, fetch=fetching))
    server.shutdown()
    server.server_close()
    assert [item.meta["url"] for item in items if isinstance(item, Sample)] == urls
    assert server.most_under_way <= concurrency


def test_a_lost_network_fills_no_ledger(web: Web, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = [f"http://127.0.0.1:{closed.getsockname()[1]}/{number}" for number in range(20)]
    with pytest.raises(ConnectionError, match="source: no server of the 20 images of part 00000 could be reached; can"):
        fetch(tmp_path, [*dead, "no url"])
    assert reasons(fetch(tmp_path, [*dead, f"{web.url}/status/404"])) == ["connection"] * 20 + ["http_404"]
    assert reasons(fetch(tmp_path, dead[:19])) == ["connection"] * 19


def test_a_host_is_asked_for_few_images_at_once(web: Web, tmp_path: Path) -> None:
    web.delay = lambda path: 0.01
    items = fetch(tmp_path, [f"{web.url}/ok/{number}" for number in range(40)], concurrency=20, per_host=3)
    assert reasons(items) == ["fine"] * 40
    assert web.most_under_way <= 3


def test_leaving_a_part_half_read_ends_its_fetches(web: Web, tmp_path: Path) -> None:
    put(tmp_path, {"t.csv": "url,text\n" + f"{web.url}/ok/1,fine\n" + f"{web.url}/silent,never\n" * 9})
    reading = iter(source("urls", tmp_path, fetch={"allow_private": True}).read("00000"))
    assert isinstance(next(reading), Sample)
    reading.close()  # type: ignore[attr-defined]
    assert not any("(run_forever)" in thread.name for thread in threading.enumerate())


def test_digest_is_of_the_tables_bytes(store_uri: str) -> None:
    put(store_uri, {"t.csv": "url,text\nhttp://host/1,one\n"})
    before = source("urls", store_uri).digest()
    content = open_storage(store_uri).read("t.csv")
    put(store_uri, {"t.csv": content})
    assert source("urls", store_uri).digest() == before
    put(store_uri, {"t.csv": content.replace(b"one", b"two")})
    assert source("urls", store_uri).digest() != before


def test_a_pause_may_be_asked_for_in_seconds_or_until_a_time() -> None:
    assert pause_asked("120") == 120.0
    soon = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    assert 3600 < pause_asked(soon) <= 7200
    for header in ("", "soon", "-5", "Fri, 31 Dec 1999 23:59:59 GMT", "31 Dec 9999 23:59:59"):
        assert pause_asked(header) == 0.0


def test_labels_and_conditioning_images(web: Web, tmp_path: Path) -> None:
    lines = ["url,edges,class,text"]
    lines += [f"{web.url}/ok/{n},{web.url}/{edges},{name},x" for n, edges, name in
              [(1, "ok/11", "cat"), (2, "status/404", "ant"), (3, "page/x", "ant"), (4, "ok/14", "")]]  # fmt: skip
    put(tmp_path, {"t.csv": "\n".join(lines)})
    settings = {"allow_private": True, "retries": 0}
    opened = source("urls", tmp_path, label="class", condition="edges", fetch=settings)
    good, gone, page, nameless = read_all(opened)
    assert isinstance(good, Sample) and opened.classes() == ("ant", "cat")
    assert (good.image, good.condition, good.label) == (png(1), png(11), "cat")
    faults = [item for item in (gone, page, nameless) if isinstance(item, Reject)]
    assert [fault.reason for fault in faults] == ["http_404", "not_an_image", "no_label"]
    assert "conditioning image" in faults[0].detail and "conditioning image" in faults[1].detail
