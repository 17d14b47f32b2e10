"""Predictions that back off to a parent, over HTTP."""

from dataclasses import replace

import pytest

from refract.models.bundle.bundle import Bundle
from refract.serve.http.app import create_app

PARENTS = {**{f"class {i}": f"pair {i // 2}" for i in range(10)}, **{f"pair {i}": None for i in range(5)}}
BELOW, THRESHOLD = 0.405, 0.395
HIERARCHY = {"parents": PARENTS, "threshold": THRESHOLD}


@pytest.fixture(scope="module")
def hierarchical(bundle: Bundle) -> Bundle:
    """The bundle with five parents, and thresholds that some images reach by a class, some by a parent and some not at all."""
    return replace(bundle, info=replace(bundle.info, hierarchy=HIERARCHY, abstain_below=BELOW))


@pytest.fixture(scope="module")
def client(hierarchical: Bundle, serving):
    with serving(create_app(hierarchical)) as client:
        yield client


def test_predictions_back_off_and_abstain_as_the_probabilities_say(client, bundle, make_image, reference) -> None:
    files = [("f", (f"{seed}.jpg", make_image(seed))) for seed in range(24)]
    predictions = client.post("/v1/predict?top=10", files=files).json()["predictions"]
    kinds = set()
    for (_, (_, data)), row in zip(files, predictions, strict=True):
        classes = reference(bundle.classifier("cpu"), data, "multiclass")
        sums = {f"pair {i}": classes[2 * i : 2 * i + 2].sum() for i in range(5)}
        parent = max(sums, key=lambda name: sums[name])
        assert row["label"] == f"class {classes.argmax()}" and row["top"][0]["confidence"] == row["confidence"]
        kind = "class" if classes.max() >= BELOW else "parent" if sums[parent] >= THRESHOLD else "nothing"
        kinds.add(kind)
        assert row["abstain"] == (kind != "class") and ("backed_off" in row) == (kind == "parent")
        if kind == "parent":
            assert row["backed_off"] == {
                "label": parent,
                "confidence": pytest.approx(sums[parent], abs=1e-4),
                "level": 1,
            }
    assert kinds == {"class", "parent", "nothing"}


def test_the_model_lists_its_hierarchy_and_the_schema_describes_the_field(client, running) -> None:
    assert client.get("/v1/model").json()["hierarchy"] == HIERARCHY
    assert running.get("/v1/model").json()["hierarchy"] is None
    schema = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["responses"]["200"]["content"]
    fields = schema["application/json"]["schema"]["properties"]["predictions"]["items"]["properties"]
    assert set(fields["backed_off"]["required"]) == {"label", "confidence", "level"}


def test_a_prediction_below_the_limit_is_counted_as_abstained_also_if_it_backs_off(
    hierarchical, serving, make_image
) -> None:
    app = create_app(hierarchical)
    with serving(app) as client:
        files = [("f", (f"{seed}.jpg", make_image(seed))) for seed in range(24)]
        rows = client.post("/v1/predict", files=files).json()["predictions"]
        counted = app.state.service.metrics.registry.get_sample_value("refract_abstained_total")
    assert counted == sum(row["confidence"] < BELOW for row in rows) > sum("backed_off" in row for row in rows) > 0
