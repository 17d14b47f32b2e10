"""Internals of uvicorn and httptools on which `serve/http/transport/connection.py` and `serve/http/transport/server.py` rely.
A new version may change them silently."""

import asyncio
import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http import flow_control, httptools_impl
from uvicorn.server import ServerState

from refract.serve.http.transport.connection import Connection

PROTOCOL, CYCLE, FLOW = httptools_impl.HttpToolsProtocol, httptools_impl.RequestResponseCycle, flow_control.FlowControl

TODO = (
    "uvicorn {version} has changed: {what}. Compare uvicorn/protocols/http/httptools_impl.py with the version before, mend "
    "connection.py or server.py in serve/http/transport/, run test_serve_server.py, test_serve_methods.py and test_serve_closing.py, "
    "then set the upper bound of uvicorn in pyproject.toml"
)

METHODS = {
    (PROTOCOL, "connection_made"): ["transport"],
    (PROTOCOL, "connection_lost"): ["exc"],
    (PROTOCOL, "data_received"): ["data"],
    (PROTOCOL, "eof_received"): [],
    (PROTOCOL, "pause_writing"): [],
    (PROTOCOL, "shutdown"): [],
    (PROTOCOL, "on_message_begin"): [],
    (PROTOCOL, "on_header"): ["name", "value"],
    (PROTOCOL, "on_headers_complete"): [],
    (PROTOCOL, "on_body"): ["body"],
    (PROTOCOL, "on_message_complete"): [],
    (PROTOCOL, "on_response_complete"): [],
    (PROTOCOL, "timeout_keep_alive_handler"): [],
    (PROTOCOL, "_unset_keepalive_if_required"): [],
    (FLOW, "__init__"): ["transport"],
    (FLOW, "pause_reading"): [],
    (FLOW, "resume_reading"): [],
    (uvicorn.Server, "startup"): ["sockets"],
    (uvicorn.Server, "handle_exit"): ["sig", "frame"],
}
PROTOCOL_HAS = (
    "loop parser transport flow cycle pipeline headers expect_100_continue server_state timeout_keep_alive",
    "timeout_keep_alive_task url scope",
)
CYCLE_HAS = "body more_body disconnected message_event response_started response_complete waiting_for_100_continue"
SERVER_HAS = "config started should_exit force_exit"
CONFIG_TAKES = "app http lifespan ws log_config access_log server_header proxy_headers timeout_graceful_shutdown timeout_keep_alive"


def check(holds: object, what: str) -> None:
    assert holds, TODO.format(version=version("uvicorn"), what=what)


@pytest.fixture
def protocol():
    """uvicorn's own protocol for one connection, which has parsed the head of a request."""

    async def main() -> httptools_impl.HttpToolsProtocol:
        async def app(scope, receive, send) -> None:
            await receive()

        config = uvicorn.Config(app, ws="none", log_config=None)
        connection = PROTOCOL(config=config, server_state=ServerState(), app_state={})
        reading, _ = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0), None
        transport, _ = await connection.loop.create_connection(lambda: connection, *reading.sockets[0].getsockname())
        connection.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        await asyncio.sleep(0)
        transport.abort()
        reading.close()
        return connection

    return asyncio.run(main())


@pytest.mark.parametrize("owner, name", METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_a_method_that_is_replaced_or_called(owner: type, name: str) -> None:
    method = getattr(owner, name, None)
    check(method, f"{owner.__name__}.{name} is gone")
    parameters = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
    expected = METHODS[owner, name]
    check(parameters == expected, f"{owner.__name__}.{name} takes {parameters}, not {expected}")


def test_attributes_that_are_read_or_set(protocol) -> None:
    for name in " ".join(PROTOCOL_HAS).split():
        check(hasattr(protocol, name), f"HttpToolsProtocol.{name} is gone")
    for name in CYCLE_HAS.split():
        check(hasattr(protocol.cycle, name), f"RequestResponseCycle.{name} is gone")
    check(isinstance(protocol.cycle.body, bytearray), "RequestResponseCycle.body is not a bytearray")
    check(isinstance(protocol.cycle.message_event, asyncio.Event), "RequestResponseCycle.message_event is not an Event")
    check(hasattr(protocol.flow, "read_paused"), "FlowControl.read_paused is gone")
    check(hasattr(protocol.server_state, "default_headers"), "ServerState.default_headers is gone")
    check(protocol.url == b"/" and (b"host", b"x") in protocol.headers, "url and headers are not what was sent")
    check(protocol.headers is protocol.scope["headers"], "scope has other headers than the protocol")
    check(hasattr(protocol.pipeline, "popleft") and hasattr(protocol.pipeline, "clear"), "pipeline is not a deque")


def test_added_names_do_not_collide_with_uvicorns(protocol) -> None:
    used = set(re.findall(r"self\.(_\w+)", inspect.getsource(Connection))) - {name for _, name in METHODS}
    taken = used & {*dir(PROTOCOL), *vars(protocol)}
    check(
        not taken,
        f"HttpToolsProtocol now has {sorted(taken)}, which serve/http/transport/connection.py uses for something else",
    )


def test_constants_and_server_attributes(bundle) -> None:
    check(flow_control.CLOSE_HEADER == (b"connection", b"close"), "CLOSE_HEADER is another")
    check(isinstance(flow_control.HIGH_WATER_LIMIT, int), "HIGH_WATER_LIMIT is not a number")
    check(httptools_impl.STATUS_LINE[431].startswith(b"HTTP/1.1 431 "), "STATUS_LINE is another")
    taken = inspect.signature(uvicorn.Config).parameters
    for name in CONFIG_TAKES.split():
        check(name in taken, f"Config takes no {name}")
    server = uvicorn.Server(uvicorn.Config(print, log_config=None))
    for name in SERVER_HAS.split():
        check(hasattr(server, name), f"Server.{name} is gone")


def test_the_parser() -> None:
    for name in ("HttpParserError", "HttpParserUpgrade", "HttpParserInvalidMethodError"):
        check(issubclass(getattr(httptools, name, int), Exception), f"httptools.{name} is gone")
    for name in ("feed_data", "get_method", "get_http_version", "should_upgrade", "set_dangerous_leniencies"):
        check(hasattr(httptools.HttpRequestParser, name), f"httptools.HttpRequestParser.{name} is gone")
    check(httptools.parse_url(b"*").path == b"*", "httptools.parse_url reads * in another way")


def test_the_installed_version_was_checked() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    (bounds,) = [line for line in project["dependencies"] if line.startswith("uvicorn")]
    match = re.fullmatch(r"uvicorn\[standard\]>=[\d.]+,<0\.(\d+)", bounds)
    check(match, f"pyproject.toml has no upper bound: {bounds}")
    minor = version("uvicorn").split(".")[:2]
    check(minor[0] == "0" and int(minor[1]) < int(match[1]), f"it is not below the bound {bounds}")
