"""Check the head of a request before it is parsed (RFC 9112, 2.3 and 3)."""

import ipaddress
import re

from refract.serve.http.errors import Problem

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
"""The methods that HTTP defines (RFC 9110, 9; RFC 5789). The server rejects every other one."""

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_LINE = re.compile(rb"%s +\S+ (\S+)\r\n" % _TOKEN)
_METHOD = re.compile(rb"(%s)(?: [^\r\n]*)?" % _TOKEN)
_HOST = re.compile(rb"(?:\[([^\]]*)\]|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::([0-9]{0,5}))?")


def line_problem(line: bytes) -> Problem | None:
    """Return the problem of a complete request line, which ends with a line feed, or None: a malformed line, another protocol or
    version, or an unknown method."""
    match = _LINE.fullmatch(line)
    if match is None:
        return Problem(400, "invalid_http", "the request line must be METHOD TARGET HTTP/1.1")
    if match[1] not in (b"HTTP/1.1", b"HTTP/1.0"):
        protocol = match[1][:20].decode("latin-1")
        return Problem(
            400, "invalid_http", f"the request line names {protocol!r}; this server supports HTTP/1.1 and HTTP/1.0"
        )
    return unknown_method(line)


def unknown_method(line: bytes) -> Problem | None:
    """Return the problem of a request line, or of its first part, whose method is a valid token but not one of METHODS; else None."""
    match = _METHOD.match(line)
    if match is None or match.end() < len(line.rstrip(b"\r\n")) or (method := match[1].decode("ascii")) in METHODS:
        return None
    return Problem(501, "unknown_method", f"unknown method {method[:40]!r}; known: {', '.join(METHODS)}")


def host_is_valid(host: bytes) -> bool:
    """Whether the value of a Host header field is a host, which may be empty, with or without a port (RFC 9110, 7.2)."""
    match = _HOST.fullmatch(host)
    if match is None or int(match[2] or 0) > 65_535:
        return False
    if match[1] is None:
        return True
    try:
        ipaddress.IPv6Address(match[1].decode("latin-1"))
    except ValueError:
        return False
    return True
