"""Tables of URLs and captions, whose images are fetched as the shards are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Literal

from pydantic import Field

from genpipe.data.images import ImageError, read_header
from genpipe.data.prefetch import in_order
from genpipe.data.samples import Reject, Sample
from genpipe.data.sources.fetch import Failure, FetchConfig, Fetcher
from genpipe.data.sources.identity import digest_entries
from genpipe.data.sources.tables import Row, TableConfig, Tables

LOST = 20  # servers that cannot be reached, one after another, are no accident


class UrlsConfig(TableConfig):
    """Rows of parquet, CSV or JSON lines with the URL of an image."""

    kind: Literal["urls"]
    url: str = Field("url", min_length=1, description="column of URLs")
    fetch: FetchConfig = FetchConfig()


class UrlsSource:
    """The rows of tables of URLs, in the order of the tables whatever the order of arrival.

    The group is the column that is named for it, else the URL. Every failure is a Reject: http_404 (or another
    status), timeout, connection, tls, bad_url, private_address, too_many_redirects, too_large, noai, empty,
    not_an_image, unsupported. Raises ValueError as `Tables` does.
    """

    def __init__(self, cfg: UrlsConfig, *, part_size: int, setting: str) -> None:
        self.cfg, self.setting = cfg, setting
        suffixes = {".parquet", ".csv", ".jsonl"}
        self.tables = Tables(
            cfg, image=cfg.url, image_setting="url", part_size=part_size, suffixes=suffixes, setting=setting
        )

    def parts(self) -> list[str]:
        """`00000`, `00001`, ...: at most `part_size` rows each."""
        return self.tables.parts()

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """Fetch the images of a part; one item for each row.

        Raises ConnectionError at the end of a part if no server could be reached: then the network is down.
        """
        outcomes: Counter[str] = Counter()
        with Fetcher(self.cfg.fetch) as fetcher:

            def submit(row: Row | Reject) -> Future[list[bytes | Failure]]:
                return _AllOf([_submit(fetcher, cell) for cell in self._cells(row)])

            for row, contents in in_order(submit, self.tables.rows(part), ahead=2 * self.cfg.fetch.concurrency):
                if isinstance(row, Reject):
                    yield row
                    continue
                outcomes.update(content.reason if isinstance(content, Failure) else "fine" for content in contents)
                yield _sample(row, *contents)
        lost = outcomes["connection"] + outcomes["timeout"]
        if lost >= LOST and lost + outcomes["bad_url"] == outcomes.total():
            raise ConnectionError(
                f"{self.setting}: no server of the {lost} images of part {part} could be reached; can this machine "
                "reach others? No proxy is used"
            )

    def _cells(self, row: Row | Reject) -> list[Any]:
        """The URLs of a row: of its image, then of its conditioning image if it must have one."""
        if isinstance(row, Reject):
            return []
        return [row.image, row.condition] if self.cfg.condition else [row.image]

    def classes(self) -> tuple[str, ...]:
        """The names of the classes, as `Tables.classes` finds them."""
        return self.tables.classes()

    def digest(self) -> str:
        """sha256 over the tables' names and content. What stands behind the URLs may change without it."""
        return digest_entries(self.tables.storage, self.tables.entries)


def _submit(fetcher: Fetcher, cell: Any) -> Future[bytes | Failure]:
    if isinstance(cell, str):
        return fetcher.submit(cell)
    nothing: Future[bytes | Failure] = Future()
    nothing.set_result(Failure("bad_url", "the row has none"))
    return nothing


class _AllOf(Future[list[bytes | Failure]]):
    """The results of several futures."""

    def __init__(self, futures: list[Future[bytes | Failure]]) -> None:
        super().__init__()
        self._futures = futures

    def result(self, timeout: float | None = None) -> list[bytes | Failure]:
        return [future.result(timeout) for future in self._futures]

    def cancel(self) -> bool:
        return all([future.cancel() for future in self._futures])


def _sample(row: Row, content: bytes | Failure, condition: bytes | Failure | None = None) -> Sample | Reject:
    url = row.image if isinstance(row.image, str) else row.place
    for what, fetched in (("", content), ("its conditioning image: ", condition)):
        if isinstance(fetched, Failure):
            return Reject(row.key, url, fetched.reason, what + fetched.detail)
        if fetched is not None and (fault := _fault(fetched)):
            return Reject(row.key, url, fault.reason, what + fault.detail)
    assert isinstance(content, bytes) and not isinstance(condition, Failure)
    meta = {**row.meta, "url": url, "file_name": url}
    return Sample(
        row.key,
        row.group or url,
        content,
        row.captions,
        meta,
        caption_weights=row.weights,
        label=row.label,
        condition=condition,
    )


def _fault(content: bytes) -> Failure | None:
    """Why an answer is no image; one that is damaged or enormous is for the stage to judge, as of any source."""
    if not content:
        return Failure("empty", "the answer has no bytes")
    try:
        read_header(content)
    except ImageError as error:
        return Failure(error.reason, error.detail) if error.reason in ("not_an_image", "unsupported") else None
    return None
