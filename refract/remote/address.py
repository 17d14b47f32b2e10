"""URLs of remote files: which schemes are known, and URLs that must not contain credentials."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote, unquote, urljoin, urlsplit

from refract.errors import InputError
from refract.models.credentials import masked

SCHEMES: Mapping[str, str] = MappingProxyType(
    {"s3": "s3", "gs": "gcs", "az": "azure", "hf": "hf", "https": "", "http": ""}
)
"""Scheme → extra of Refract that it needs, or ""."""

_URL = re.compile(rf"({'|'.join(SCHEMES)})://")
_CREDENTIALS: Mapping[str, str] = MappingProxyType({
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the login of gcloud",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
    "hf": "HF_TOKEN", "https": "~/.netrc", "http": "~/.netrc",
})  # fmt: skip


class AddressError(InputError):
    """Raised for a URL that cannot be used."""


def is_remote(name: str) -> bool:
    """Return whether a name is a URL of SCHEMES."""
    return _URL.match(name) is not None


def is_object_store(url: str) -> bool:
    """Return whether a URL without credentials names a bucket, or a folder in it."""
    return re.match(r"(s3|gs|az)://[^/]", url) is not None and not has_credentials(url)


def path_or_url(name: str) -> Path | str:
    """Return a URL as it is, and another name as a path, which would lose a slash of a URL."""
    return name if is_remote(name) else Path(name)


def scheme_of(url: str) -> str:
    """Return the scheme of a URL for which `is_remote` is true."""
    return url.partition("://")[0]


def credentials_of(url: str) -> str:
    """Return where the credentials of a URL's scheme come from, in words."""
    return _CREDENTIALS[scheme_of(url)]


def has_credentials(url: str) -> bool:
    """Return whether a URL contains a password, token or signature."""
    return "@" in url.partition("://")[2].partition("/")[0] or ("?" in url and masked(url) != url)


def checked(url: str) -> str:
    """Return the URL without a slash at the end. AddressError if it has no host, or contains a password or a signature."""
    host = url.partition("://")[2].partition("/")[0]
    if not host:
        raise AddressError(f"{masked(url)}: is not a complete URL; write {scheme_of(url)}://HOST/PATH")
    if has_credentials(url):
        raise AddressError(
            f"{masked(url)}: contains a password, token or signature, which runs would store; give credentials by "
            f"{credentials_of(url)}"
        )
    return url.rstrip("/")


def joined(base: str, path: str) -> str:
    """Return the URL of a path relative to the folder `base`; a URL as it is. AddressError for a path out of the host or bucket."""
    if is_remote(path):
        return checked(path)
    if re.match(r"[A-Za-z][\w+.-]*:", path):
        raise AddressError(f"{masked(path)}: is not a path below {base}, nor a URL with {', '.join(SCHEMES)}")
    web = scheme_of(base).startswith("http")
    host, _, folder = base.partition("://")[2].partition("/")
    # The names of other stores are no URLs: `?`, `#` and `%` have no meaning in them. `urljoin` knows the schemes of the web only.
    quoted = (lambda name: name.replace("#", "%23")) if web else (lambda name: quote(name, safe="/"))
    target = urlsplit(urljoin(f"http://host/{quoted(folder)}".rstrip("/") + "/", quoted(path)))
    if target.netloc != "host":
        raise AddressError(f"{masked(path)}: is not a path below {base}; write the whole URL")
    inside = f"{target.path}?{target.query}" if target.query else target.path
    return checked(f"{scheme_of(base)}://{host}{inside if web else unquote(inside)}")
