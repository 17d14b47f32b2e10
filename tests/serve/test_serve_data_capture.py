"""Captured samples of requests are limited in size, random, and never delay a response."""

import json
import logging
import os
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from refract.augment.image_statistics import measure_image
from refract.serve.http.app import create_app
from refract.serve.requests.decoding import RequestImages, read
from refract.serve.rollout.data_capture import WAITING, DataCapture, _DiskQuota
from refract.serve.runtime.engine import Engine

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

MIB = 1024 * 1024


def rows_of(folder: Path) -> list[dict]:
    return [
        json.loads(line) for file in sorted(folder.glob("inputs-*.jsonl")) for line in file.read_text().splitlines()
    ]


def asked(data: bytes) -> RequestImages:
    from refract.serve.requests.limits import Limits

    return read("image/jpeg", data, Limits())


def test_captured_rows_match_the_responses(bundle, serving, make_image, tmp_path):
    sampling = DataCapture(tmp_path / "log", fraction=1, most_bytes=MIB, below=0.4)
    data = [make_image(seed, size=(90, 60)) for seed in range(12)]
    with serving(create_app(bundle, sampling=sampling)) as client:
        answers = [client.post("/v1/predict?top=1", content=one).json()["predictions"][0] for one in data]
        client.post("/v1/predict?tta=flip&explain=true", files=[("a", data[0]), ("b", data[1])])
        client.post("/v1/predict", content=b"no image")
    rows = rows_of(tmp_path / "log")
    assert len(rows) == 14 and {row["model"] for row in rows} == {bundle.digest[:16]}
    preprocess = Engine(bundle).preprocess
    for row, answer, one in zip(rows, answers, data, strict=False):
        assert row["answered"] == [answer["label"]] and row["confidence"] == pytest.approx(
            answer["confidence"], abs=1e-5
        )
        expected = {"width": 90, "height": 60, "aspect": 1.5, **measure_image(preprocess(one))._asdict()}
        assert row["statistics"] == pytest.approx(expected, abs=1e-5)
        image_bytes = row["image"] and (tmp_path / "log" / row["image"]).read_bytes()
        assert image_bytes == (one if answer["confidence"] < 0.4 else None)
    assert 0 < sum(row["image"] is not None for row in rows[:12]) < 12, "some predictions were uncertain"
    files = [file for file in (tmp_path / "log").rglob("*") if file.is_file()]
    assert all(file.stat().st_mode & 0o077 == 0 for file in files), "only the owner may read them"


def test_about_the_fraction_is_sampled_and_shadow_requests_are_not(bundle, other, make_image, tmp_path, serving):
    from refract.serve.rollout.canary import Challenge

    sampling = DataCapture(tmp_path / "log", fraction=0.3, most_bytes=MIB, below=0)
    challenge = Challenge(Engine(other), 1.0, False)
    with serving(create_app(bundle, sampling=sampling, challenge=challenge)) as client:
        for _ in range(20):
            client.post("/v1/predict", files=[("a", make_image(seed)) for seed in range(10)])
    rows = rows_of(tmp_path / "log")
    assert 30 <= len(rows) <= 90 and {row["model"] for row in rows} == {bundle.digest[:16]}
    assert not list((tmp_path / "log" / "images").iterdir())


def test_tensors_and_multi_label_predictions_are_captured(make_bundle, serving, tmp_path):
    several = make_bundle(tmp_path / "several", task="multilabel", thresholds=[0.5] * 10)
    sampling = DataCapture(tmp_path / "log", fraction=1, most_bytes=MIB, below=1)
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 4, 8, 3], "data": [100] * 96}
    with serving(create_app(several, sampling=sampling)) as client:
        outputs = client.post("/v2/models/shapes/infer", json={"inputs": [tensor]}).json()["outputs"][0]["data"]
    (row,) = rows_of(tmp_path / "log")
    given = np.array(outputs, np.float32)
    assert row["answered"] == [f"class {i}" for i in np.flatnonzero(given >= 0.5)] and row["image"] is None
    assert row["confidence"] == pytest.approx(np.maximum(given, 1 - given).mean(), abs=1e-5)
    assert (row["statistics"]["width"], row["statistics"]["brightness"]) == (8, pytest.approx(100 / 255, abs=1e-3))


def test_the_disk_quota_is_never_exceeded_and_the_oldest_files_are_deleted(bundle, make_image, tmp_path):
    sampling = DataCapture(tmp_path, fraction=1, most_bytes=200_000, below=1)
    sampling.start()
    data = make_image(0, size=(300, 300))
    row, batch = np.full((1, 10), 0.1, np.float32), np.zeros((1, 32, 32, 3), np.uint8)
    most = 0
    for _ in range(6):
        for _ in range(100):
            sampling.offer(bundle, asked(data), batch, row)
        while sampling._held:
            time.sleep(0.001)
        most = max(most, sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
    newest = sorted(file.name for file in (tmp_path / "images").iterdir())[-1]
    assert 100_000 < most <= 200_000 and rows_of(tmp_path)[-1]["image"] == f"images/{newest}"
    sampling.stop()
    (tmp_path / "images").rename(tmp_path / "pictures")  # the folder of earlier versions
    again = DataCapture(tmp_path, fraction=1, most_bytes=50_000, below=1)
    assert (tmp_path / "images").is_dir() and not (tmp_path / "pictures").exists()
    again.start()
    again.offer(bundle, asked(data), batch, row)
    again.stop()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 50_000, (
        "files of an earlier run count"
    )


def test_an_image_above_a_tenth_of_the_quota_is_not_stored(tmp_path):
    quota = _DiskQuota(tmp_path, "[!.]*", 1000)
    assert quota.keep("a", b"x" * 101) is None and quota.keep("b", b"x" * 100) == "b"
    (tmp_path / ".c.partial").touch()
    _DiskQuota(tmp_path, "[!.]*", 1000)
    assert [file.name for file in tmp_path.iterdir()] == ["b"], "partial files of a crash are deleted"


def test_a_hanging_writer_delays_no_response_and_the_queue_is_limited(
    bundle, serving, make_image, tmp_path, monkeypatch
):
    sampling = DataCapture(tmp_path, fraction=1, most_bytes=MIB, below=1)
    ends: list[str] = []
    hold = threading.Event()
    monkeypatch.setattr(sampling, "_write", lambda sample: hold.wait(60))
    app = create_app(bundle, sampling=sampling)
    sampling.count = ends.append
    with serving(app) as client:
        start = time.monotonic()
        for _ in range(30):
            assert client.post("/v1/predict", files=[("a", make_image(seed)) for seed in range(20)]).status_code == 200
        assert time.monotonic() - start < 20
        assert ends.count("dropped") >= 600 - WAITING - 1 and sampling._waiting.qsize() <= WAITING
        hold.set()


def test_the_queue_is_limited_in_bytes(bundle, make_image, tmp_path):
    sampling = DataCapture(tmp_path, fraction=1, most_bytes=1000 * MIB, below=1)  # not started: all samples wait
    ends: list[str] = []
    sampling.count = ends.append
    large = asked(make_image(0) + b"\0" * 10 * MIB)
    for _ in range(5):
        sampling.offer(bundle, large, np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 10), 0.1, np.float32))
    assert ends == ["dropped"] * 2 and sampling._held < 32 * MIB


def test_a_removed_folder_fails_no_request(bundle, serving, make_image, tmp_path, caplog):
    sampling = DataCapture(tmp_path / "log", fraction=1, most_bytes=MIB, below=1)
    (tmp_path / "log" / "images").rmdir()
    (tmp_path / "log").rmdir()
    (tmp_path / "log").write_text("a file in its place")
    app = create_app(bundle, sampling=sampling)
    with caplog.at_level(logging.WARNING), serving(app) as client:
        assert [client.post("/v1/predict", content=make_image(seed)).status_code for seed in range(5)] == [200] * 5
    assert caplog.text.count("samples cannot be written") == 1, "once a minute"
    counted = app.state.service.metrics.registry.get_sample_value("refract_sampled_total", {"end": "failed"})
    assert counted == 5


def test_the_command_captures_samples_that_the_drift_check_reads(bundle, make_image, tmp_path):
    from test_serve_command import finish, start

    folder = tmp_path / "log"
    process = start(
        str(bundle.path), "--port", "0", "--sample", str(folder), "--sample-fraction", "1", "--sample-below", "0"
    )
    address = process.stdout.readline().rpartition(" on ")[2].strip()
    with httpx.Client(base_url=address, trust_env=False) as client:
        for seed in range(3):
            assert client.post("/v1/predict", content=make_image(seed)).status_code == 200
    process.terminate()
    assert finish(process)[0] == 0 and len(rows_of(folder)) == 3, "waiting samples are written at shutdown"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_reported_at_the_start(bundle, tmp_path):
    from test_serve_command import finish, start

    tmp_path.chmod(0o500)
    code, _, err = finish(start(str(bundle.path), "--port", "0", "--sample", str(tmp_path)))
    assert code == 2 and "--sample" in err


def test_a_file_in_place_of_the_folder_is_reported_at_the_start(bundle, tmp_path):
    from test_serve_command import finish, start

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    code, _, err = finish(start(str(bundle.path), "--port", "0", "--sample", str(tmp_path / "a.png")))
    assert code == 2 and err.startswith("refract serve: --sample: ")


def test_waiting_samples_are_written_at_shutdown(bundle, serving, make_image, tmp_path, monkeypatch):
    sampling = DataCapture(tmp_path, fraction=1, most_bytes=MIB, below=0)
    for seed in range(50):
        sampling.offer(
            bundle, asked(make_image(seed)), np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 10), 0.1, np.float32)
        )
    stop, ended = sampling.stop, []
    monkeypatch.setattr(sampling, "stop", lambda: ended.append(stop()))
    with serving(create_app(bundle, sampling=sampling)):
        pass
    assert len(rows_of(tmp_path)) == 50 and len(ended) == 1
