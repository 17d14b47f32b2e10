"""The live accuracy in the metrics and in `/v1/model`."""

import asyncio

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from refract.serve.http.app import create_app
from refract.serve.rollout.canary import Challenge
from refract.serve.runtime.engine import Engine


def metrics_of(app) -> dict[tuple[str, ...], float]:
    """(name, label values…) → value, of every series."""
    text = generate_latest(app.state.service.metrics.registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_metrics_and_the_model_route_show_each_version_s_live_accuracy(bundle, other, serving, make_image) -> None:
    app = create_app(bundle, challenge=Challenge(Engine(other), 1.0, True), feedback_keep=40)
    with serving(app) as client:
        assert client.get("/v1/model").json()["live"] == {"retained": 0, "models": []}
        assert metrics_of(app)[("refract_feedback_retained",)] == 0
        for seed in range(8):
            if seed == 4:  # the canary answers the first four requests, the champion the others
                app.state.service.models.challenger = None
            response = client.post("/v1/predict", content=make_image(seed))
            label = response.json()["predictions"][0]["label"]
            wrong = next(name for name in bundle.info.labels if name != label)
            feedback = {"id": response.headers["x-request-id"], "labels": [wrong if seed in (0, 5, 6) else label]}
            assert client.post("/v1/feedback", json=feedback).status_code == 200
        client.post("/v1/feedback", json=feedback)
        client.post("/v1/feedback", json={"id": "never", "labels": [label]})
        live, metrics = client.get("/v1/model").json()["live"], metrics_of(app)
    assert live["retained"] == 8
    assert [(model["digest"], model["judged"], model["accuracy"]["value"]) for model in live["models"]] == [
        (bundle.digest[:16], 4, 0.5),
        (other.digest[:16], 4, 0.75),
    ]
    for model in live["models"]:
        for name in ("accuracy", "calibration"):
            ends = [metrics[f"refract_live_{name}{end}", model["digest"]] for end in ("", "_low", "_high")]
            assert ends == list(model[name].values()) and ends[1] < ends[0] < ends[2]
        assert metrics["refract_live_judged", model["digest"]] == 4
        for row in model["classes"]:
            assert metrics["refract_live_class_accuracy", model["digest"], row["label"]] == row["value"]
        assert sum(row["judged"] for row in model["classes"]) == 4
    assert metrics["refract_feedback_total", "accepted"] == 8 and metrics["refract_feedback_total", "replaced"] == 1
    assert metrics["refract_feedback_total", "unknown_prediction"] == 1 and metrics[("refract_feedback_retained",)] == 8


def test_the_metrics_of_the_served_model_follow_a_swap(make_bundle, serving, tmp_path) -> None:
    bundles = [make_bundle(tmp_path / str(seed), seed=seed) for seed in range(2)]
    bundles[0].info.metrics["accuracy"] = 0.9
    app = create_app(bundles[0])
    service = app.state.service
    assert metrics_of(app)[("refract_ready",)] == 0, "before the self-test"

    async def swap() -> None:
        await service.start()
        before = metrics_of(app)
        assert before[("refract_ready",)] == 1 and before["refract_test_accuracy", bundles[0].digest[:16]] == 0.9
        assert before["refract_model_created_seconds", bundles[0].digest[:16]] == 1735689600
        assert before["refract_swaps_total", "refused"] == before["refract_swaps_total", "done"] == 0
        await service.models.swap(Engine(bundles[1]))
        after = metrics_of(app)
        assert {name[1] for name in after if name[0] == "refract_model_created_seconds"} == {bundles[1].digest[:16]}
        assert not any(name[0] == "refract_test_accuracy" for name in after), "its bundle states no accuracy"
        service.start_draining()
        assert metrics_of(app)[("refract_ready",)] == 0
        await service.stop()

    asyncio.run(swap())
