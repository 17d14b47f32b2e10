"""Files of web servers, by HTTP."""

import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from refract.models.credentials import masked
from refract.remote.address import credentials_of
from refract.remote.store import ChangedError, RefusedError, RemoteObject

if TYPE_CHECKING:
    import httpx

_CONNECT_S, _READ_S = 10, 30
_NO_HEAD = (405, 501)
"""Codes of a server without the method HEAD."""
_LATER = (408, 425, 429)
"""Codes below 500 that ask for another attempt."""
UNVERSIONED = uuid.uuid4().hex
"""The version of files whose server names none: they are read again in each process."""


class WebFiles:
    """Files of web servers, which cannot be listed or written."""

    def __init__(self, url: str) -> None:
        self._pid = 0
        self._client: Any = None

    def info(self, url: str) -> RemoteObject:
        with self._open("HEAD", url) as response:
            if response.status_code not in _NO_HEAD:
                return _object(url, response, response.headers.get("content-length"))
        with self._open("GET", url, {"range": "bytes=0-0"}) as response:
            ranged = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("content-range", ""))
            return _object(url, response, ranged[1] if ranged else response.headers.get("content-length"))

    def list(self, url: str) -> Sequence[RemoteObject]:
        raise RefusedError(
            f"{url}: a web server's folder cannot be listed; name a table (.csv, .tsv, .parquet) or an archive (.zip, .tar)"
        )

    def read(self, item: RemoteObject, start: int) -> Iterator[bytes]:
        return self.content(item.url, start, version=item.version)

    def content(
        self, url: str, start: int, headers: Mapping[str, str] = MappingProxyType({}), version: str | None = None
    ) -> Iterator[bytes]:
        """Yield the content from the byte `start` on. ChangedError if it has another version than `version`, where that is given."""
        ranged = {"range": f"bytes={start}-"} if start else {}
        with self._open("GET", url, {**headers, **ranged}) as response:
            if version is not None and _version(response) != version:
                raise ChangedError(url)
            partial = response.status_code == 206
            skipped = 0 if partial else start  # a server without ranges sends all
            sent = response.headers.get("content-range", "")
            if partial and not sent.startswith(f"bytes {start}-"):
                raise ConnectionError(
                    f"the server sent {sent or 'no content-range'!r} in place of the bytes from {start:,} on"
                )
            for block in response.iter_raw(1 << 20):
                yield block[skipped:]
                skipped = max(0, skipped - len(block))

    def upload(self, path: Path, url: str) -> None:
        self.remove(url)

    def remove(self, url: str) -> None:
        raise RefusedError(f"{url}: a web server cannot be written to; use s3://, gs://, az:// or a file")

    def _open(self, method: str, url: str, headers: dict[str, str] | None = None) -> Any:
        return _Response(self._http(), method, url, {"accept-encoding": "identity", **(headers or {})})

    def _http(self) -> "httpx.Client":
        if self._pid != os.getpid():  # connections do not survive a fork
            import httpx

            logging.getLogger("httpx").addFilter(_mask)
            self._client = httpx.Client(
                follow_redirects=True,
                timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S),
                auth=_netrc(),
            )
            self._pid = os.getpid()
        return self._client


def _mask(record: logging.LogRecord) -> bool:
    """Mask a record of httpx: it logs each request, and servers redirect to URLs with signatures."""
    record.msg, record.args = masked(record.getMessage()), ()
    return True


def _netrc() -> "httpx.NetRCAuth | None":
    """Return the credentials of ~/.netrc. RefusedError for a file that cannot be parsed, without its content."""
    import netrc

    import httpx

    file = Path.home() / ".netrc"
    try:
        return httpx.NetRCAuth(str(file)) if file.is_file() else None
    except netrc.NetrcParseError as error:
        raise RefusedError(f"{file}, line {error.lineno}: is not a valid .netrc; correct or remove the line") from None


class _Response:
    """A response as a context. Errors that may be temporary are OSErrors."""

    def __init__(self, client: "httpx.Client", method: str, url: str, headers: dict[str, str]) -> None:
        self.url, self._stream = url, client.stream(method, url, headers=headers)
        self._allowed = _NO_HEAD if method == "HEAD" else ()

    def __enter__(self) -> "httpx.Response":
        import httpx

        try:
            response = self._stream.__enter__()
        except httpx.UnsupportedProtocol as error:
            raise RefusedError(
                f"{self.url}: redirects to a URL of another kind ({error}); name a URL of http:// or https://"
            ) from error
        except httpx.HTTPError as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        code = response.status_code
        if 200 <= code < 300 or code in self._allowed:
            return response
        self._stream.__exit__(None, None, None)
        if code in (404, 410):
            raise FileNotFoundError(2, f"No such file (HTTP {code})", self.url)
        if code >= 500 or code in _LATER:
            raise ConnectionError(f"HTTP {code}")
        raise RefusedError(f"{self.url}: HTTP {code}; check the URL, and {credentials_of(self.url)}")

    def __exit__(self, *error: Any) -> None:
        import httpx

        self._stream.__exit__(*error)
        if isinstance(error[1], httpx.HTTPError):
            raise ConnectionError(f"{type(error[1]).__name__}: {error[1]}") from error[1]


def _version(response: "httpx.Response") -> str:
    headers = response.headers
    return str(headers.get("etag") or headers.get("last-modified") or UNVERSIONED)


def _object(url: str, response: "httpx.Response", size: str | None) -> RemoteObject:
    return RemoteObject(url, int(size) if size is not None and size.isdigit() else -1, _version(response))
