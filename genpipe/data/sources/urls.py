"""Tables of URLs and captions, whose images are fetched as the shards are written."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Literal

from PIL import Image, UnidentifiedImageError
from pydantic import Field

from genpipe.data.prefetch import in_order
from genpipe.data.samples import Reject, Sample
from genpipe.data.sources.fetch import Failure, FetchConfig, Fetcher
from genpipe.data.sources.tables import Row, TableConfig, Tables
from genpipe.storage import open_object

BLOCK = 2**23
LOST = 20  # servers that cannot be reached, one after another, are no accident


class UrlsConfig(TableConfig):
    """Rows of parquet, CSV or JSON lines with the URL of an image."""

    kind: Literal["urls"]
    url: str = Field("url", min_length=1, description="column of URLs")
    fetch: FetchConfig = FetchConfig()


class UrlsSource:
    """The rows of tables of URLs in their order, whatever the order of arrival.

    The group is the column that is named for it, else the URL. Every failure is a Reject: http_404 (or another
    status), timeout, connection, tls, bad_url, private_address, too_many_redirects, too_large, noai, empty,
    not_an_image. Raises ValueError as `Tables` does.
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

        Raises ConnectionError at the end of a part of which nobody could be reached: then it is the network.
        """
        outcomes: Counter[str] = Counter()
        with Fetcher(self.cfg.fetch) as fetcher:

            def submit(row: Row | Reject) -> Future[bytes | Failure]:
                if isinstance(row, Row) and isinstance(row.image, str):
                    return fetcher.submit(row.image)
                nothing: Future[bytes | Failure] = Future()
                nothing.set_result(Failure("bad_url", "the row has none"))
                return nothing

            for row, content in in_order(submit, self.tables.rows(part), ahead=2 * self.cfg.fetch.concurrency):
                if isinstance(row, Row):
                    outcomes[content.reason if isinstance(content, Failure) else "fine"] += 1
                yield row if isinstance(row, Reject) else _sample(row, content)
        lost = outcomes["connection"] + outcomes["timeout"]
        if lost >= LOST and lost + outcomes["bad_url"] == outcomes.total():
            raise ConnectionError(
                f"{self.setting}: no server of the {lost} images of part {part} could be reached; can this machine "
                "reach others? No proxy is used"
            )

    def digest(self) -> str:
        """sha256 over the tables' names and bytes. What stands behind the URLs may change without it."""
        digest = hashlib.sha256()
        for entry in self.tables.entries:
            with open_object(self.tables.storage, entry, block=BLOCK) as file:
                digest.update(f"{entry.key}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


def _sample(row: Row, content: bytes | Failure) -> Sample | Reject:
    url = row.image if isinstance(row.image, str) else row.place
    if isinstance(content, Failure):
        return Reject(row.key, url, content.reason, content.detail)
    if not content:
        return Reject(row.key, url, "empty", "the answer has no bytes")
    try:
        Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        return Reject(row.key, url, "not_an_image", f"starts with {content[:16]!r}")
    except Exception:
        # An image, though a damaged or enormous one: for the stage to judge, as with any other source.
        pass
    meta = {**row.meta, "url": url, "file_name": url}
    return Sample(row.key, row.group or url, content, row.captions, meta, caption_weights=row.weights)
