"""Masking of passwords and tokens in output, logs and files."""

import logging
import subprocess
import sys

import pytest

from refract.models.credentials import hide_credentials, masked, masked_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://alice:s3cretpw@127.0.0.1:9", "http://***@127.0.0.1:9"),
        ("(https://t0ken@mlflow.example/path)", "(https://***@mlflow.example/path)"),
        ("postgresql+psycopg2://mlflow:p@ss/w:rd@db:5432/x", "postgresql+psycopg2://***@db:5432/x"),
        ("mysql+pymysql://u:pw@h/d?ssl=1", "mysql+pymysql://***@h/d?ssl=1"),
        ("http://h/x?token=abc&y=1 and http://h?a=1&api_key=q", "http://h/x?token=***&y=1 and http://h?a=1&api_key=***"),
        ("https://s3/w.pt?X-Amz-Signature=ff&X-Amz-Security-Token=gg", "https://s3/w.pt?X-Amz-Signature=***&X-Amz-Security-Token=***"),
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("https://h/?accessToken=x&client_secret=y", "https://h/?accessToken=***&client_secret=***"),
        ("connection failed: host=db password=geheim user=m", "connection failed: host=db password=*** user=m"),
        ("http://***@127.0.0.1:9?token=***", "http://***@127.0.0.1:9?token=***"),
        ("postgresql://user@server:S3cretPass@db.example:5432/x", "postgresql://***@db.example:5432/x"),
        ("https://me@corp.com:pw@host/", "https://***@host/"),
        ("https://u:pa'ss1@h/", "https://***@h/"),
        ("login(user='m', password='geheim', port=1)", "login(user='m', password='***', port=1)"),
        ("{'password': 'geheim', 'user': 'm'}", "{'password': '***', 'user': 'm'}"),
        ("DB_PASSWORD: geheim", "DB_PASSWORD: ***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
    ],
)  # fmt: skip
def test_credentials_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown and masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/api?run=1", "postgresql://mlflow@database:5432/mlflow", "sqlite:////a/b@c/mlflow.db",
        "models:/cats@champion",        "me@example.com", "12:30: a@b", "tokens=64", "http://host:5000/models@x", "max_length=3",
        "sorted(rows, key=len)[0]", "augment key=3", "data.token=images", "pwd=/home/me", "a" + "-a" * 20_000,
    ],
)  # fmt: skip
def test_text_without_credentials_is_unchanged(text: str) -> None:
    assert masked(text) == text


def test_secrets_of_the_environment_are_masked_by_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:pa%40ssword@h")
    values = {"a": ["key abcdefgh1", 3, ("http://h/pa@ssword",)], "b": {"c": "/data/pa@ssword"}}
    stored = {"a": ["key ***", 3, ["http://h/***"]], "b": {"c": "/data/pa@ssword"}}
    assert masked_values(values) == stored, "a stored path must name the same folder"
    assert masked("no pa@ssword, no pa%40ssword") == "no ***, no ***"


def test_a_password_that_is_an_ordinary_word_leaves_messages_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:mlflow@db/mlflow")
    assert masked("mlflow at postgresql://mlflow:mlflow@db/mlflow") == "mlflow at postgresql://***@db/mlflow"


def test_every_library_logs_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        hide_credentials()
        try:
            raise ValueError("http://u:hidden@h")
        except ValueError:
            logging.getLogger("a.library").exception("no answer from %s after %d s", "http://u:hidden@h", 3)
    finally:
        logging.setLogRecordFactory(before)
    assert "no answer from http://***@h after 3 s" in caplog.text and "ValueError: http://***@h" in caplog.text
    assert "hidden" not in caplog.text.replace('"http://u:hidden@h"', "")  # the traceback shows the line of this file


def test_an_uncaught_error_is_printed_without_credentials() -> None:
    code = (
        "import threading; from refract.models.credentials import hide_credentials; hide_credentials(); u = 'http://u:hid' + 'den@h'\n"
        "def f(): raise OSError(u)\nt = threading.Thread(target=f); t.start(); t.join(); f()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("OSError: http://***@h") == 2 and "hidden" not in done.stderr
