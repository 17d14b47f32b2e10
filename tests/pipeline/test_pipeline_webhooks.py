"""`retrain.webhook`: events reach a server that fails at first, hangs or is down, and no run waits for it."""

import hmac
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_data import Run

from refract.pipeline.cli import retrain
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.files import locked
from refract.pipeline.retraining.notification import notify, outbox
from refract.pipeline.retraining.run import begin
from refract.pipeline.retraining.steps import STEPS, Outcome
from refract.pipeline.retraining.workspace import read_run, workspace_of, write_run
from refract.pipeline.webhooks.outbox import GIVE_UP, Outbox

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


class Receiver:
    """A server that responds with the next of `statuses`, else 204; 0 never responds, -1 sends a header without an end."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.released = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((dict(self.headers), body))
                status = receiver.statuses.pop(0) if receiver.statuses else 204
                if status == 0:
                    receiver.released.wait()
                    return
                while status == -1 and not receiver.released.wait(0.01):
                    self.wfile.write(b"H")
                    self.wfile.flush()
                self.send_response(max(status, 200))
                if status == 302:
                    self.send_header("Location", receiver.url)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.requests]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.released.set()
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture
def box(receiver: Receiver, tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "webhooks", receiver.url)


def waiting(box: Outbox) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((box.folder / "waiting").glob("*.json"))]


def test_an_event_is_delivered_once_and_signed(
    box: Outbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRACT_WEBHOOK_SECRET", "correct horse")
    event = box.add({"why": "größer", "mlflow": "http://ann:secret@mlflow"}, NOON)
    assert box.deliver(NOON) == 1 and box.deliver(NOON) == 0 and not waiting(box)
    ((headers, body),) = receiver.requests
    assert json.loads(body) == {"id": event, "why": "größer", "mlflow": "http://***@mlflow"}
    assert headers["X-Refract-Event"] == event and headers["Content-Type"].startswith("application/json")
    assert headers["X-Refract-Timestamp"] == str(int(NOON.timestamp()))
    signed = headers["X-Refract-Timestamp"].encode() + b"." + body
    assert headers["X-Refract-Signature"] == "sha256=" + hmac.new(b"correct horse", signed, "sha256").hexdigest()


def test_without_a_secret_there_is_no_signature(box: Outbox, receiver: Receiver) -> None:
    box.add({})
    box.deliver()
    assert "X-Refract-Signature" not in receiver.requests[0][0]


def test_a_server_that_fails_gets_the_events_later_in_their_order(
    box: Outbox, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [500, 503, 429]
    for number in range(2):
        box.add({"number": number}, NOON + timedelta(microseconds=number))
    assert box.deliver(NOON + timedelta(seconds=1)) == 0 and len(receiver.requests) == 1, "the second one waits"
    assert box.deliver(NOON + timedelta(seconds=60)) == 0 and len(receiver.requests) == 2, "the first one is not due"
    assert [one["attempts"] for one in waiting(box)] == [1, 1]
    assert box.deliver(NOON + timedelta(seconds=62)) == 0
    assert [one["attempts"] for one in waiting(box)] == [2, 1]
    assert datetime.fromisoformat(waiting(box)[0]["next"]) == NOON + timedelta(seconds=62 + 120), "the wait doubles"
    assert box.deliver(NOON + timedelta(minutes=10)) == 2 and not waiting(box)
    assert [body["number"] for body in receiver.bodies[-2:]] == [0, 1]
    assert "127.0.0.1 responded with status 503" in caplog.text and "/hook" not in caplog.text


@pytest.mark.parametrize("status", [408, 425, 429])
def test_a_busy_server_gets_the_events_later(box: Outbox, receiver: Receiver, status: int) -> None:
    receiver.statuses = [status]
    for number in range(2):
        box.add({"number": number}, NOON + timedelta(microseconds=number))
    assert box.deliver(NOON + timedelta(seconds=1)) == 0 and len(receiver.requests) == 1, "the second one waits"


@pytest.mark.parametrize("status", [400, 302])
def test_an_event_that_is_refused_does_not_block_the_others(box: Outbox, receiver: Receiver, status: int) -> None:
    receiver.statuses = [status]
    box.add({"number": 0}, NOON)
    box.add({"number": 1}, NOON + timedelta(microseconds=1))
    assert box.deliver(NOON + timedelta(seconds=1)) == 1
    assert [one["body"]["number"] for one in waiting(box)] == [0] and len(receiver.requests) == 2


def test_an_event_is_kept_for_a_week(box: Outbox, receiver: Receiver) -> None:
    receiver.statuses = [500] * 3
    box.add({}, NOON)
    box.deliver(NOON + GIVE_UP - timedelta(minutes=1))
    assert waiting(box)
    box.deliver(NOON + GIVE_UP, early=True)
    assert not waiting(box) and len(list((box.folder / "undelivered").iterdir())) == 1
    assert box.deliver(NOON + 2 * GIVE_UP) == 0


def test_a_damaged_file_and_another_process_stop_nothing(
    box: Outbox, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    box.add({"number": 1}, NOON)
    (box.folder / "waiting" / "0.json").write_text("{")
    with locked(box.folder / "lock", AssertionError()):
        assert box.deliver() == 0 and not receiver.requests
    assert box.deliver(NOON) == 1 and "0.json cannot be read" in caplog.text


@pytest.mark.parametrize("status", [0, -1])
def test_a_server_that_hangs_blocks_no_run(
    box: Outbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """-1: each byte of the response arrives before the timeout of a single read, and so none of them ever is the last."""
    monkeypatch.setattr("refract.pipeline.webhooks.outbox.LIMIT_S", 0.2)
    receiver.statuses = [status]
    box.add({"number": 1})
    box.deliver_in_background()
    assert "not delivered within 0.2 s" in caplog.text and waiting(box)
    receiver.released.set()
    for thread in threading.enumerate():
        if thread.name == "webhook":
            thread.join(30)
    assert box.deliver(early=True) in (0, 1) and not waiting(box), "the scheduler's, or that of the next run"


def test_a_server_that_never_ends_its_response_ends_the_attempt(
    box: Outbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("refract.pipeline.webhooks.delivery.DEADLINE_S", 0.2)
    receiver.statuses = [-1]
    box.add({"number": 1}, NOON)
    assert box.deliver(NOON) == 0 and [one["attempts"] for one in waiting(box)] == [1]
    assert "127.0.0.1: no response in 0.2 s" in caplog.text


def test_a_clock_that_was_set_back_delays_no_event(box: Outbox, receiver: Receiver) -> None:
    receiver.statuses = [500]
    box.add({"number": 1}, NOON)
    box.deliver(NOON)
    assert box.deliver(NOON - timedelta(hours=1)) == 0, "the wait of a minute has not passed"
    assert box.deliver(NOON - timedelta(days=365)) == 1


def test_a_path_that_is_not_utf_8_is_sent(box: Outbox, receiver: Receiver) -> None:
    box.add({"run": "/data/\udcff"})
    assert box.deliver() == 1 and receiver.bodies[0]["run"] == "/data/\udcff"


def test_a_secret_that_cannot_be_encoded_is_reported(
    box: Outbox, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REFRACT_WEBHOOK_SECRET", "hidden\udcff")
    box.add({})
    assert box.deliver() == 0 and not receiver.requests and waiting(box)
    assert "REFRACT_WEBHOOK_SECRET is not valid UTF-8" in caplog.text and "hidden" not in caplog.text


def test_the_config_imports_no_http_client() -> None:
    code = "import sys, refract.pipeline.config.config; print({'urllib.request', 'http.client', 'email'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def config_at(root: Path, url: str | None, **retraining: Any) -> Config:
    values = {
        "data": {"source": str(root / "images")},
        "trainer": {"runs_dir": str(root / "runs")},
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db", "model_name": "colors"},
        "retrain": {"folder": str(root / "retrain"), "webhook": url, **retraining},
    }
    (root / "colors.yaml").write_text(yaml.safe_dump(values))
    return config_from_dict(values)


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def ends(config: Config, outcome: Outcome, **record: Any) -> Path:
    """Do the last step of a run with this outcome."""
    folder = begin(config, force=False)
    ended: Any = read_run(folder) | {"ends": int(outcome), "why": "because", "mlflow": "sqlite://", **record}
    write_run(folder, ended)
    STEPS[-1](folder)
    assert read_run(folder)["outcome"] == outcome
    return folder


GATE = {"passed": True, "lines": [{"name": "accuracy", "value": 0.9}, {"name": "holdout", "value": None}]}


def test_a_run_reports_its_result(receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/report.html").touch()
    config = config_at(tmp_path, receiver.url)
    folder = begin(config, force=False)
    (folder / "report").mkdir()
    (folder / "report/report.html").touch()
    record = read_run(folder) | {
        "version": "7", "champion": "6", "gate": GATE, "mlflow_run": "abc", "mlflow": "http://ann:secret@mlflow:5000",
        "training_run": str(tmp_path / "runs/one"),
    }  # fmt: skip
    notify(folder, config, record, Outcome.PROMOTED, "because")
    (body,) = receiver.bodies
    assert (body["event"], body["outcome"], body["model"], body["run"]) == (
        "retraining",
        "promoted",
        "colors",
        folder.name,
    )
    assert (body["version"], body["champion"], body["why"]) == ("7", "6", "because")
    assert body["metrics"] == {"accuracy": 0.9} and body["gate"] == GATE
    assert body["links"] == {
        "run": str(folder),
        "report": str(folder / "report/report.html"),
        "training_report": str(tmp_path / "runs/one/report.html"),
        "mlflow_version": "http://***@mlflow:5000/#/models/colors/versions/7",
        "mlflow_run": "http://***@mlflow:5000/#/runs/abc",
    }


def test_only_the_named_results_are_sent(receiver: Receiver, tmp_path: Path) -> None:
    config = config_at(tmp_path, receiver.url, webhook_on=["refused", "unchanged"])
    ends(config, Outcome.PROMOTED)
    ends(config, Outcome.REFUSED)
    ends(config, Outcome.PROMOTED, unchanged=True)
    assert [body["outcome"] for body in receiver.bodies] == ["refused", "unchanged"]


def test_a_run_that_is_killed_after_its_event_sends_the_same_id_again(receiver: Receiver, tmp_path: Path) -> None:
    config = config_at(tmp_path, receiver.url)
    folder = ends(config, Outcome.REFUSED, attempts=1)
    killed = {key: value for key, value in read_run(folder).items() if key not in ("outcome", "ended")}
    write_run(folder, {**killed, "attempts": 2})  # type: ignore[typeddict-item] # the keys are a Record's
    STEPS[-1](folder)
    write_run(folder, {**killed, "why": "of another run"})  # type: ignore[typeddict-item] # as above
    STEPS[-1](folder)
    first, again, other = (body["id"] for body in receiver.bodies)
    assert first == again != other


def test_a_failure_of_an_unchanged_run_is_a_failure(receiver: Receiver, tmp_path: Path) -> None:
    config = config_at(tmp_path, receiver.url)
    folder = begin(config, force=False)
    record = read_run(folder) | {"unchanged": True, "ends": 0, "why": "unchanged"}
    for _ in range(2):
        notify(folder, config, record, Outcome.FAILED, "the disk is full")  # type: ignore[arg-type] # a Record's keys
    assert [body["outcome"] for body in receiver.bodies] == ["failed"] * 2
    assert receiver.bodies[0]["id"] != receiver.bodies[1]["id"], "each attempt is an event"


def test_a_server_that_is_down_gets_the_event_with_the_next_run(
    tmp_path: Path, receiver: Receiver, caplog: Any
) -> None:
    ends(config_at(tmp_path, f"http://127.0.0.1:{free_port()}/hook"), Outcome.REFUSED)
    assert "waits for the next attempt: 127.0.0.1: [Errno 111] Connection refused" in caplog.text
    ends(config_at(tmp_path, receiver.url, webhook_on=["promoted"]), Outcome.REFUSED)
    assert [body["outcome"] for body in receiver.bodies] == ["refused"]


def test_a_full_disk_fails_no_run(receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_at(tmp_path, receiver.url)
    workspace_of(config).root.mkdir(parents=True)
    (workspace_of(config).root / "webhooks").touch()  # no folder can be made
    with caplog.at_level(logging.WARNING):
        ends(config, Outcome.REFUSED)
    assert "webhook: " in caplog.text


def fails(*_: object) -> None:
    raise OSError(28, "no space left on device")


def test_a_failed_run_is_reported(
    receiver: Receiver, new_tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(new_tracking, tmp_path)
    config_at(tmp_path, None)
    monkeypatch.setenv("REFRACT_WEBHOOK_URL", receiver.url)
    monkeypatch.setattr("refract.pipeline.retraining.snapshot.take", fails)
    assert retrain.main([str(tmp_path / "colors.yaml")]) == Outcome.FAILED
    (body,) = receiver.bodies
    assert body["outcome"] == "failed" and "no space left on device" in body["why"]
    stored = "".join(path.read_text(errors="replace") for path in (tmp_path / "retrain").rglob("*.*"))
    assert receiver.url not in stored, "an address of the environment is not stored"


def test_the_address_of_the_environment_replaces_that_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(tmp_path, "https://example.com/a")
    assert outbox(config_at(tmp_path, None)) is None
    monkeypatch.setenv("REFRACT_WEBHOOK_URL", "https://hooks.example.com/b?token=12345678")
    box = outbox(config)
    assert box is not None and box.url.endswith("token=12345678")
    monkeypatch.setenv("REFRACT_WEBHOOK_URL", "hooks")
    with pytest.raises(ConfigError, match="REFRACT_WEBHOOK_URL: expected an address such as https://example.com/hook"):
        outbox(config)
    notify(tmp_path, config, {}, 0, "")  # only logs it


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("example.com/hook", "such as https://example.com/hook"),
        ("ftp://example.com", "such as https://example.com/hook"),
        ("http://[bad", "such as https://example.com/hook"),
        ("http://a b/", "such as https://example.com/hook"),
        ("https://example.com/h\u00f6ok", "such as https://example.com/hook"),
        ("https://example.com/a\x7f", "such as https://example.com/hook"),
        ("https://ann:secret@example.com", r"'https://\*\*\*@example.com' is not an address without a user name"),
        ("https://example.com?token=12345678", r"token=\*\*\*' is not an address without a token; set .*REFRACT_WEBHOOK_URL"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_used_is_named(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"retrain\.webhook: .*{message}"):
        config_from_dict({"retrain": {"webhook": url}})
    with pytest.raises(ConfigError, match=r"retrain\.webhook_on"):
        config_from_dict({"retrain": {"webhook_on": ["never"]}})


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, f"not in a minute: {what}"
        time.sleep(0.02)


@pytest.mark.slow
def test_the_scheduler_delivers_what_waits(receiver: Receiver, tmp_path: Path) -> None:
    config = config_at(tmp_path, receiver.url)
    box = outbox(config)
    assert box is not None
    box.add({"number": 1})
    command = [sys.executable, "-m", "refract", "schedule", "colors.yaml", "--cron", "0 2 1 1 *"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        until(lambda: receiver.requests and not waiting(box), "it is delivered")
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_the_command_line_takes_a_webhook(receiver: Receiver, tmp_path: Path, refract: Run) -> None:
    config_at(tmp_path, None)
    refract("retrain", "colors.yaml", "--retrain.webhook", receiver.url, "--retrain.webhook_on", "[refused]", code=20)
    assert receiver.bodies[0]["outcome"] == "refused"
