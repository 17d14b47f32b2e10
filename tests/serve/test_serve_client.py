"""The clients against working and failing servers."""

import asyncio
import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from warm_process import shared

from refract.serve.client import AsyncClient, Client, ServerError
from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys

ROOT = Path(__file__).parents[2]
KEY = "open-sesame"


def test_both_clients_return_the_predictions_of_the_server(bundle, serving, make_image, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    (tmp_path / "a.jpg").write_bytes(make_image(1))
    app = create_app(bundle, keys=ApiKeys(tmp_path / "keys"))
    with serving(app) as http:
        url, wanted = (
            str(http.base_url),
            http.post("/v1/predict?top=2", content=make_image(1), headers={"X-API-Key": KEY}),
        )

        async def ask() -> list[dict]:
            async with AsyncClient(url, key=KEY) as client:
                rows = await client.predict([make_image(1), tmp_path / "a.jpg"], top=2)
                for index, row in enumerate(rows):
                    assert (await client.feedback(row["id"], [row["label"]], index=index))["correct"]
                return rows

        with Client(url, key=KEY) as client:
            (row,) = client.predict([str(tmp_path / "a.jpg")], top=2)
            assert {name: value for name, value in row.items() if name != "id"} == wanted.json()["predictions"][0]
            assert client.feedback(row["id"], [row["label"]])["correct"] is True
            with pytest.raises(TypeError, match="not a single label"):
                client.feedback(row["id"], row["label"])
            with pytest.raises(ServerError, match="add the member index") as refused:
                client.feedback(client.predict([make_image(1), make_image(2)])[0]["id"], ["class 0"])
            assert (refused.value.status, refused.value.code) == (422, "invalid_request")
            assert client.predict([make_image(4)], explain=True)[0]["explanation_method"] == "occlusion"
            with pytest.raises(ServerError, match="the image") as refused:
                client.predict([b"no image"])
            assert (refused.value.status, refused.value.code) == (400, "invalid_image")
            with pytest.raises(ValueError, match="no images"):
                client.predict([])
            with pytest.raises(TypeError, match="expected lists"):
                client.predict("a.jpg")
        with pytest.raises(RuntimeError, match="use `with Client"):
            Client(url, key=KEY).predict([make_image(1)])
        for prediction in asyncio.run(ask()):
            assert prediction["label"] == wanted.json()["predictions"][0]["label"] and len(prediction["top"]) == 2
        with Client(url) as client, pytest.raises(ServerError, match="requires an API key"):
            client.predict([make_image(1)])


class Busy(BaseHTTPRequestHandler):
    """Respond 429 twice, close the connection once, then respond 200; record the time of each request."""

    times: list[float] = []  # noqa: RUF012 — one test, one server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Busy.times.append(time.monotonic())
        if len(Busy.times) == 3:
            self.connection.close()
            return
        self.send_response(429 if len(Busy.times) < 3 else 200)
        self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(
            json.dumps({"predictions": [{"label": "a"}], "code": "overloaded", "detail": "later"}).encode()
        )

    def log_message(self, *_: object) -> None:
        pass


def test_the_client_waits_for_retry_after_and_retries(caplog: pytest.LogCaptureFixture) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            assert client.predict([b"x"]) == [{"label": "a"}]
        gaps = [b - a for a, b in zip(Busy.times, Busy.times[1:], strict=False)]
        assert len(gaps) == 3 and min(gaps[:2]) >= 1.0
        assert [line.getMessage() for line in caplog.records if line.name == "refract.serve.client"] == [
            "the server is busy (429); next try in 1 s"
        ] * 2
        Busy.times.clear()
        with Client(f"http://127.0.0.1:{server.server_port}", tries=1) as client, pytest.raises(ServerError) as refused:
            client.predict([b"x"])
        assert (refused.value.status, refused.value.code) == (429, "overloaded")
        server.shutdown()


def test_an_unreachable_server_is_reported() -> None:
    message = r"does not respond .*start it with `refract serve`"
    with Client("http://127.0.0.1:9", tries=2) as client, pytest.raises(ServerError, match=message):
        client.predict([b"x"])


@pytest.mark.slow
def test_the_command_predicts_with_a_server(bundle, serving, make_image, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_image(1))
    (tmp_path / "bad.jpg").write_bytes(b"no image")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return shared().run(["predict", *arguments], cwd=tmp_path, env={}, seconds=60)

    with serving(create_app(bundle)) as http:
        done = run("in", "bad.jpg", "gone.jpg", f"--url={http.base_url}", "--top", "2", "--json")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        wanted = http.post("/v1/predict?top=2", content=make_image(1)).json()["predictions"][0]
        assert len(rows[0].pop("id")) == 32, "for `refract feedback`"
        assert done.returncode == 1 and rows[0] == {"path": "in/a.jpg", **wanted}
        assert "the image" in rows[1]["error"] and "No such file" in rows[2]["error"]
        assert done.stderr.splitlines()[-1] == "refract predict: 2 of 3 images have no prediction"
        assert run("in", "--url", str(http.base_url)).stdout.startswith(f"in/a.jpg: {wanted['label']} ")
    down = run("in", "--url", "http://127.0.0.1:9")
    assert down.returncode == 1 and "does not respond" in down.stderr and "Traceback" not in down.stderr
    bare = run("in", "--url", "localhost:8000")
    odd = run("in", "--url", "http://localhost:9", "--key", "ключ12345")
    assert odd.returncode == 2 and "an API key must have ASCII characters only" in odd.stderr
    assert bare.returncode == 2 and "--url='localhost:8000': a URL must start with http:// or https://" in bare.stderr
