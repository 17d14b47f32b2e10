"""Files of the Hugging Face Hub: hf://datasets/OWNER/NAME/PATH, and hf://OWNER/NAME/PATH of a model; NAME@REVISION for a revision.

A `/` in a revision is written as `%2F`, except in the Hub's own refs/pr/NUMBER and refs/convert/NAME.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from refract.remote.address import credentials_of
from refract.remote.store import RefusedError, RemoteObject
from refract.remote.web import WebFiles

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_KINDS = {"datasets": "dataset", "spaces": "space"}
_ADDRESS = re.compile(
    r"hf://((?P<kind>datasets|spaces)/)?(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>refs/(pr/\d+|convert/[^/]+)|[^/]*))?(/(?P<path>.*))?"
)
_REFUSED = (
    "RepositoryNotFoundError",
    "GatedRepoError",
    "RevisionNotFoundError",
    "HFValidationError",
    "DisabledRepoError",
)


class _Place(NamedTuple):
    """kind: dataset, space or model; repository: OWNER/NAME; revision: None for the default branch; path: in the repository."""

    kind: str
    repository: str
    revision: str | None
    path: str


class HubFiles:
    """The Hub. A token is read from HF_TOKEN, or from the login of the Hub's own command."""

    def __init__(self, url: str) -> None:
        self._web = WebFiles(url)

    def info(self, url: str) -> RemoteObject:
        place = _place(url)
        with _errors_of(url):
            entries = _api().get_paths_info(
                place.repository, [place.path], revision=place.revision, repo_type=place.kind
            )
        files = [_object(url, entry) for entry in entries if hasattr(entry, "blob_id") and entry.path == place.path]
        if not files:
            raise FileNotFoundError(2, "No such file", url)
        return files[0]

    def list(self, url: str) -> Sequence[RemoteObject]:
        place = _place(url)
        root = url.removesuffix(place.path).rstrip("/")
        with _errors_of(url):
            entries = list(
                _api().list_repo_tree(
                    place.repository, place.path or None, recursive=True, revision=place.revision, repo_type=place.kind
                )
            )
        return [_object(f"{root}/{entry.path}", entry) for entry in entries if hasattr(entry, "blob_id")]

    def read(self, item: RemoteObject, start: int) -> Iterator[bytes]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        place = _place(item.url)
        address = hf_hub_url(
            place.repository, place.path, repo_type=place.kind, revision=place.revision, endpoint=_endpoint()
        )
        token = {name.lower(): value for name, value in build_hf_headers().items()}
        # The checksum of the content is that of the version: a file that another commit replaced does not fit it.
        return self._web.content(address, start, {name: token[name] for name in ("authorization",) if name in token})

    def upload(self, path: Path, url: str) -> None:
        self.remove(url)

    def remove(self, url: str) -> None:
        raise RefusedError(f"{url}: Refract does not write to the Hub; write to s3://, gs://, az:// or a file")


def pinned(url: str) -> str:
    """Return the URL with the present commit in place of the branch or tag; a URL with a commit as it is. One attempt, as in `Store`."""
    place = _place(url)
    if re.fullmatch("[0-9a-f]{40}", place.revision or ""):
        return url
    with _errors_of(url):
        commit = _api().repo_info(place.repository, revision=place.revision, repo_type=place.kind).sha
    kind = "" if place.kind == "model" else f"{place.kind}s/"
    return f"hf://{kind}{place.repository}@{commit}/{place.path}".rstrip("/")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _api() -> "HfApi":
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise RefusedError("hf:// needs the extra 'hf'; install it with: pip install 'refract[hf]'") from error
    return HfApi(endpoint=_endpoint())


def _place(url: str) -> _Place:
    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise RefusedError(
            f"{url}: is not a complete URL; write hf://datasets/OWNER/NAME or hf://OWNER/NAME, for a file with /PATH"
        )
    revision = unquote(match["revision"]) if match["revision"] else None
    return _Place(_KINDS.get(match["kind"], "model"), match["repository"], revision, match["path"] or "")


def _object(url: str, entry: Any) -> RemoteObject:
    """Return the file of an entry: large files have the SHA-256 of their content, others the SHA-1 of git."""
    lfs = getattr(entry, "lfs", None)
    checksum = f"sha256:{lfs.sha256}" if lfs is not None else f"git:{entry.blob_id}"
    return RemoteObject(url, int(entry.size), checksum, checksum)


@contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """Translate the errors of the Hub's library."""
    try:
        yield
    except Exception as error:  # of the library, whose classes are imported with it
        names = {kind.__name__ for kind in type(error).__mro__}
        if "EntryNotFoundError" in names:
            raise FileNotFoundError(2, "No such file", url) from error
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if names & {*_REFUSED} or status in (400, 401, 403):
            first = (str(error).splitlines() or [""])[0]
            raise RefusedError(
                f"{url}: refused by the Hub ({type(error).__name__}: {first}); check the name, and {credentials_of(url)}"
            ) from error
        raise
