"""Canaries and shadows: a second model, compared with the champion."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from refract.serve.cli import command
from refract.serve.cli.options import parse
from refract.serve.http.app import create_app
from refract.serve.rollout.canary import SHADOWS, Challenge
from refract.serve.runtime.engine import Engine


def samples(app, name: str) -> list[Sample]:
    families = text_string_to_metric_families(generate_latest(app.state.service.metrics.registry).decode())
    return [sample for family in families for sample in family.samples if sample.name == name]


def ends(app) -> dict[str, float]:
    return {sample.labels["end"]: sample.value for sample in samples(app, "refract_challenger_images_total")}


def wait_for(app, total: int) -> dict[str, float]:
    deadline = time.monotonic() + 20
    while sum(ends(app).values()) < total:
        assert time.monotonic() < deadline, ends(app)
        time.sleep(0.01)
    return ends(app)


def test_a_shadow_predicts_each_request_and_its_agreement_is_counted(bundle, other, serving, make_image) -> None:
    first, second = Engine(bundle), Engine(other)
    wanted = [make_image(i) for i in range(12)]
    agreed = sum(
        first.predict(first.preprocess(data)[None]).argmax() == second.predict(second.preprocess(data)[None]).argmax()
        for data in wanted
    )
    app = create_app(bundle, challenge=Challenge(Engine(other), fraction=1, answers=False))
    with serving(app) as client:
        for data in wanted:
            answer = client.post("/v1/predict", content=data)
            assert answer.json()["model"]["digest"] == bundle.digest, "the shadow never answers"
            wait_for(app, wanted.index(data) + 1)
        challenger = client.get("/v1/model").json()["challenger"]
    assert ends(app) == {"agreed": agreed, "differed": 12 - agreed}
    assert samples(app, "refract_batch_images_sum")[0].value == 12, "the shadow's batches are not counted"
    described = {"name": "shapes", "digest": other.digest, "fraction": 1, "answers": False}
    assert challenger == described | {"share": 1}, "share is the deprecated name of fraction"


def test_a_model_agrees_with_itself_with_flip_tta(bundle, serving, make_image) -> None:
    app = create_app(bundle, challenge=Challenge(Engine(bundle), fraction=1, answers=False))
    with serving(app) as client:
        client.post("/v1/predict?tta=flip", files=[("f", ("x.jpg", make_image(i))) for i in range(3)])
        assert wait_for(app, 3) == {"agreed": 3, "differed": 0}


class Held(Engine):
    """Computes only while its gate is open."""

    gate = threading.Event()

    def compute(self, batch):
        assert self.gate.wait(30)
        return super().compute(batch)


def test_a_slow_shadow_delays_no_response(bundle, other, serving, make_image) -> None:
    Held.gate.set()
    app = create_app(bundle, challenge=Challenge(Held(other), fraction=1, answers=False))
    with serving(app) as client:
        Held.gate.clear()
        for i in range(SHADOWS + 3):
            assert client.post("/v1/predict", content=make_image(i), timeout=10).status_code == 200
        assert ends(app) == {"skipped": 3}
        Held.gate.set()
        counts = wait_for(app, SHADOWS + 3)
        assert counts["skipped"] == 3 and counts["agreed"] + counts["differed"] == SHADOWS


def test_a_slow_shadow_does_not_delay_the_shutdown(bundle, other, serving, make_image) -> None:
    Held.gate.set()
    app = create_app(bundle, challenge=Challenge(Held(other), fraction=1, answers=False))
    with serving(app) as client:
        Held.gate.clear()
        for i in range(3):
            assert client.post("/v1/predict", content=make_image(i)).status_code == 200
        threading.Timer(1.0, Held.gate.set).start()  # a batch that is being computed cannot be stopped
        start = time.monotonic()
    assert time.monotonic() - start < 9, "the deadline of the two others is 10 s"
    assert "agreed" not in ends(app) and "differed" not in ends(app), "they were cancelled"


class Broken(Engine):
    broken = False

    def compute(self, batch):
        if self.broken:
            raise RuntimeError("broken")
        return super().compute(batch)


def test_a_canary_answers_its_fraction_and_the_champion_answers_if_it_fails(bundle, other, serving, make_image) -> None:
    engine = Broken(other)
    app = create_app(bundle, challenge=Challenge(engine, fraction=0.5, answers=True))
    with serving(app) as client:

        def digests(count: int) -> list[str]:
            answers = [client.post("/v1/predict", content=make_image(i)) for i in range(count)]
            assert all(answer.status_code == 200 for answer in answers)
            for answer in answers:
                assert other.digest.startswith(answer.headers["x-model-digest"]) == (
                    answer.json()["model"]["digest"] == other.digest
                )
            return [answer.json()["model"]["digest"] for answer in answers]

        seen = digests(60)
        assert 10 < seen.count(other.digest) < 50, "each bound fails by chance with 8e-8"
        assert ends(app) == {"answered": seen.count(other.digest)}
        engine.broken = True
        assert set(digests(20)) == {bundle.digest} and ends(app)["failed"] > 0


@pytest.mark.parametrize("answers", [True, False])
def test_an_unexpected_error_of_a_challenger_fails_no_request(
    bundle, other, serving, make_image, monkeypatch: pytest.MonkeyPatch, caplog, answers: bool
) -> None:
    engine = Engine(other)

    def short(*_: object, **__: object) -> None:
        raise MemoryError

    app = create_app(bundle, challenge=Challenge(engine, fraction=1, answers=answers))
    with serving(app) as client:
        monkeypatch.setattr(engine, "preprocess", short)
        for path in ("/v1/predict", "/v1/predict?explain=true"):
            answer = client.post(path, content=make_image(1))
            assert (answer.status_code, answer.json()["model"]["digest"]) == (200, bundle.digest)
        assert wait_for(app, 2) == {"failed": 2}
    assert "failed with an unexpected error" in caplog.text


def test_an_invalid_request_is_not_a_failure_of_the_challenger(bundle, other, serving) -> None:
    app = create_app(bundle, challenge=Challenge(Engine(other), fraction=1, answers=True))
    with serving(app) as client:
        assert client.post("/v1/predict", content=b"no image").status_code == 400
        count = app.state.service.metrics.registry.get_sample_value
        assert count("refract_requests_total", {"end": "invalid_image"}) == 1 and ends(app) == {}


def test_the_champion_answers_for_a_slow_canary(bundle, other, serving, make_image) -> None:
    Held.gate.set()
    app = create_app(bundle, deadline_s=2, challenge=Challenge(Held(other), fraction=1, answers=True))
    with serving(app) as client, ThreadPoolExecutor(12) as pool:
        Held.gate.clear()
        try:
            answers = list(pool.map(lambda i: client.post("/v1/predict", content=make_image(i)), range(24)))
        finally:
            Held.gate.set()
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["model"]["digest"] for answer in answers} == {bundle.digest}


def test_the_server_starts_without_a_challenger_that_fails(
    bundle, make_bundle, serving, make_image, tmp_path, caplog
) -> None:
    strange = make_bundle(tmp_path / "strange", word="kind")
    wrong = make_bundle(tmp_path / "wrong", wrong=0.3)
    for bad, message in ((strange, "labels differ"), (wrong, "golden sample")):
        with serving(create_app(bundle, challenge=Challenge(Engine(bad), fraction=1, answers=True))) as client:
            assert client.post("/v1/predict", content=make_image(1)).status_code == 200
            assert client.get("/v1/model").json()["challenger"] is None and message in caplog.text


@pytest.mark.parametrize(
    ("source", "next_step"),
    [
        ("models:/shapes@challenger", "looks it up again every 60 s"),
        ("models:/shapes/2", "does not try again; correct the source and restart it"),
    ],
)
def test_a_challenger_that_cannot_be_loaded_is_reported_with_the_next_step(
    source: str, next_step: str, monkeypatch: pytest.MonkeyPatch, tmp_path, capsys
) -> None:
    monkeypatch.setattr(command, "_bundle", lambda source: (_ for _ in ()).throw(command.InvalidOptionError("unset")))
    challenge = command._challenge(parse([str(tmp_path), "--challenger", source, "--canary", "0.1"]), Engine)
    assert challenge.engine is None
    assert capsys.readouterr().err == (
        f"refract serve: --challenger: unset; the server starts without a challenger and {next_step}\n"
    )


@pytest.mark.parametrize("fraction", [0, -1, 1.1, float("nan")])
def test_a_fraction_outside_0_to_1_is_rejected(fraction: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        Challenge(None, fraction=fraction, answers=True)


PIXELS = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}]}


def test_a_canary_answers_no_request_for_a_version(bundle, other, serving) -> None:
    app = create_app(bundle, challenge=Challenge(Engine(other), fraction=1, answers=True))
    with serving(app) as client:
        champion, canary = bundle.digest[:16], other.digest[:16]
        answered_by = client.post("/v2/models/shapes/infer", json=PIXELS).json()["model_version"]
        pinned = client.post(f"/v2/models/shapes/versions/{champion}/infer", json=PIXELS).json()["model_version"]
        assert (answered_by, pinned) == (canary, champion) and ends(app) == {"answered": 1}
        refused = client.post(f"/v2/models/shapes/versions/{canary}/infer", json=PIXELS)
        assert (refused.status_code, refused.json()["code"]) == (404, "unknown_model")
