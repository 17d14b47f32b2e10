"""The head of a request, checked before it is parsed (RFC 9112, 2.3 and 3). Knows nothing of connections."""

import ipaddress
import re

from refract.serve.http.errors import Problem

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
"""The methods that HTTP itself defines (RFC 9110, 9; RFC 5789); another is unknown to this server."""

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_LINE = re.compile(rb"%s +\S+ (\S+)\r\n" % _TOKEN)
_METHOD = re.compile(rb"(%s)(?: [^\r\n]*)?" % _TOKEN)
_HOST = re.compile(rb"(?:\[([^\]]*)\]|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::([0-9]{0,5}))?")


def line_problem(line: bytes) -> Problem | None:
    """What is wrong with a whole request line, which ends with a line feed: another protocol or version, or no request line at all."""
    match = _LINE.fullmatch(line)
    if match is None:
        return Problem(400, "invalid_http", "the request line is not METHOD TARGET HTTP/1.1")
    if match[1] not in (b"HTTP/1.1", b"HTTP/1.0"):
        spoken = match[1][:20].decode("latin-1")
        return Problem(
            400, "invalid_http", f"the request line names {spoken!r}; this server speaks HTTP/1.1 and HTTP/1.0"
        )
    return unknown_method(line)


def unknown_method(line: bytes) -> Problem | None:
    """For the line of a request, or the part of it that has arrived, whose method is a valid word but not one of METHODS."""
    match = _METHOD.match(line)
    if match is None or match.end() < len(line.rstrip(b"\r\n")) or (method := match[1].decode("ascii")) in METHODS:
        return None
    return Problem(501, "unknown_method", f"the method {method[:40]!r} is not known; known are {', '.join(METHODS)}")


def host_is_valid(host: bytes) -> bool:
    """Whether the value of a Host header field is a host with or without a port (RFC 9110, 7.2), which may be empty."""
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
