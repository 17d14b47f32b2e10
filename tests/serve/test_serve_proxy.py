"""CORS for pages of other origins, and the server below a path of a reverse proxy."""

import pytest

from refract.serve.cli.options import parse
from refract.serve.client import Client
from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys
from refract.serve.http.base_path import prefix_problem
from refract.serve.http.cors import is_origin

ORIGIN = "https://app.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}
PREFIX = "/models/shapes"


@pytest.fixture(scope="module")
def shared(bundle, serving, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("open-sesame\n")
    with serving(create_app(bundle, keys=ApiKeys(keys), cors_origins=[ORIGIN, "http://localhost:3000"])) as client:
        yield client


@pytest.fixture(scope="module")
def rooted(bundle, serving):
    with serving(create_app(bundle, root_path=PREFIX)) as client:
        yield client


def cors(answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def test_without_the_option_no_origin_is_allowed(running) -> None:
    for answer in (running.options("/v1/predict", headers=PREFLIGHT), running.get("/livez", headers=PREFLIGHT)):
        assert not cors(answer) and "vary" not in answer.headers


def test_a_preflight_needs_no_key_and_the_request_after_it_does(shared, make_image) -> None:
    answer = shared.options("/v1/predict", headers=PREFLIGHT)
    assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    for name in ("authorization", "x-api-key", "content-type", "content-encoding"):
        assert name in answer.headers["access-control-allow-headers"].lower()
    for key, status in (("", 401), ("Bearer open-sesame", 200)):
        sent = {"Origin": ORIGIN, "Authorization": key}
        answer = shared.post("/v1/predict", content=make_image(1), headers=sent)
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize("origin", ["https://evil.example", "http://app.example", "https://app.example:444", "null"])
def test_another_origin_is_not_allowed(shared, origin: str) -> None:
    for answer in (
        shared.get("/livez", headers={"Origin": origin}),
        shared.options("/livez", headers={**PREFLIGHT, "Origin": origin}),
    ):
        assert not cors(answer) and answer.headers["vary"] == "Origin" and answer.status_code in (200, 204)


def test_responses_vary_by_origin_and_allow_no_credentials(shared) -> None:
    for path in ("/livez", "/none", "/", "/v1/model"):
        for headers in ({}, {"Origin": ORIGIN}, PREFLIGHT):
            answer = shared.get(path, headers=headers)
            assert answer.headers["vary"] == "Origin" and "access-control-allow-credentials" not in answer.headers


def test_every_origin_may_be_allowed(bundle, serving) -> None:
    with serving(create_app(bundle, cors_origins=["*"])) as client:
        for answer in (
            client.get("/livez", headers={"Origin": "null"}),
            client.options("/v1/predict", headers=PREFLIGHT),
        ):
            assert (
                answer.headers["access-control-allow-origin"] == "*"
                and "access-control-allow-credentials" not in answer.headers
            )


def test_the_origins_of_the_command_line(capsys) -> None:
    assert parse(["x", "--cors-origin", "https://a.example", "http://localhost:3000"]).cors_origin == (
        "https://a.example",
        "http://localhost:3000",
    )
    assert parse(["--cors-origin", "*", "--cors-origin", "http://[::1]:80", "--root-path", "/a", "x"]).cors_origin == (
        "*",
        "http://[::1]:80",
    )
    for wrong in (
        "app.example",
        "https://app.example/",
        "https://App.example",
        "https://app.example/a",
        "null",
        "",
        "https://*",
    ):
        assert not is_origin(wrong)
        with pytest.raises(SystemExit):
            parse(["x", "--cors-origin", wrong])
        assert "--cors-origin: " in capsys.readouterr().err


@pytest.mark.parametrize("before", ["", PREFIX], ids=["the proxy removes it", "the proxy keeps it"])
def test_every_route_is_served_below_the_prefix(rooted, bundle, make_image, before: str) -> None:
    def get(path: str):
        answer = rooted.get(before + path)
        assert answer.status_code == 200, answer.text
        return answer

    assert get("/openapi.json").json()["servers"] == [{"url": PREFIX}]
    for path in ("/docs", "/redoc"):
        html = get(path).text
        assert f"{PREFIX}/openapi.json" in html and f"{PREFIX}/static-offline-docs/" in html
        assert html.count("static-offline-docs/") == html.count(f"{PREFIX}/static-offline-docs/")
    assert get("/static-offline-docs/favicon.png").content
    assert 'fetch("v1/model"' in get("/").text, "relative to the page"
    assert get("/v2/models/shapes/ready").json()["ready"] is True
    assert rooted.post(f"{before}/v1/predict", content=make_image(1)).status_code == 200
    assert rooted.post(f"{before}/v2/models/shapes/infer", json={}).json()["error"], "as the protocol has it"
    assert rooted.get(f"{before}/v1/predict").headers["allow"] == "OPTIONS, POST"
    assert rooted.options(f"{before}/livez").headers["allow"] == "GET, HEAD, OPTIONS"
    assert rooted.get(f"{before}/none").status_code == 404
    with Client(str(rooted.base_url).rstrip("/") + before) as client:
        assert len(client.predict([make_image(1)])) == 1


def test_the_prefix_redirects_to_the_page(rooted) -> None:
    answer = rooted.get(PREFIX)
    assert (answer.status_code, answer.headers["location"]) == (308, f"{PREFIX}/")
    assert rooted.get(PREFIX + "x").status_code == 404


@pytest.mark.parametrize("prefix", ["models", "/models/", "/", "/a/../b", "/a b", "/v1", "/v2/x", "https://x/a", "//a"])
def test_an_invalid_prefix_is_rejected(prefix: str, capsys) -> None:
    assert prefix_problem(prefix)
    with pytest.raises(SystemExit):
        parse(["x", "--root-path", prefix])
    assert "--root-path: " in capsys.readouterr().err
