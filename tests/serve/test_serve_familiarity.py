"""Familiarity and similar training images over HTTP."""

import asyncio
import base64
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.covariance import LedoitWolf

from refract.models.bundle.bundle import Bundle, BundleError
from refract.serve.http.app import create_app
from refract.serve.metrics import Metrics
from refract.serve.requests.limits import Limits
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.service import Service
from refract.serve.runtime.settings import ServiceSettings


@pytest.fixture(scope="module")
def familiar(make_bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose training images are those of the seeds 0 … 39, and whose validation images are those of 40 … 59."""
    return make_bundle(tmp_path_factory.mktemp("familiar") / "shapes", training=True)


@pytest.fixture(scope="module")
def http(familiar: Bundle, serving):
    with serving(create_app(familiar, similar=True)) as client:
        yield client


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_familiarity_is_the_rank_among_the_validation_images(http, familiar: Bundle, make_image) -> None:
    engine = Engine(familiar)

    def embeddings(seeds: range) -> np.ndarray:
        return unit(engine.compute(np.stack([engine.preprocess(make_image(seed)) for seed in seeds]))["embedding"])

    train, validation, new = embeddings(range(40)), embeddings(range(40, 60)), embeddings(range(60, 64))
    classes = np.arange(40) % 10
    means = np.stack([train[classes == number].mean(axis=0) for number in range(10)])
    precision = LedoitWolf(assume_centered=True).fit(train - means[classes]).precision_

    def far(rows: np.ndarray) -> np.ndarray:
        gaps = rows[:, None] - means
        return np.einsum("ncd,de,nce->nc", gaps, precision, gaps).min(axis=1)

    usual, distances = far(validation), far(new)
    expected = [(usual > distance).mean() for distance in distances]
    files = [("f", ("x.jpg", make_image(seed))) for seed in range(60, 64)]
    rows = http.post("/v1/predict", files=files).json()["predictions"]
    assert [row["familiarity"] for row in rows] == pytest.approx(expected, abs=1 / 20 + 1e-6)
    assert http.post("/v1/predict", content=make_image(3)).json()["predictions"][0]["familiarity"] >= 0.9
    flipped = http.post("/v1/predict?tta=flip", content=make_image(60)).json()["predictions"][0]
    views = np.stack([engine.preprocess(make_image(60))])
    mean = unit(sum(engine.compute(view)["embedding"] for view in (views, views[:, :, ::-1].copy())))
    expected = (usual > far(mean)).mean()
    assert flipped["familiarity"] == pytest.approx(expected, abs=1 / 20 + 1e-6)


def test_the_open_inference_protocol_returns_the_familiarity_if_the_request_names_it(
    http, bundle, serving, make_image
) -> None:
    files = [base64.b64encode(make_image(seed)).decode() for seed in (3, 60)]
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [2], "data": files}
    body = {"inputs": [tensor], "outputs": [{"name": "familiarity"}]}
    (output,) = http.post("/v2/models/shapes/infer", json=body).json()["outputs"]
    form = [("f", ("x.jpg", make_image(seed))) for seed in (3, 60)]
    wanted = [row["familiarity"] for row in http.post("/v1/predict", files=form).json()["predictions"]]
    assert (output["datatype"], output["shape"], output["data"]) == ("FP32", [2], pytest.approx(wanted, abs=1e-6))
    assert http.get("/v2/models/shapes").json()["outputs"][-1]["name"] == "familiarity"
    with serving(create_app(bundle)) as without:
        answer = without.post("/v2/models/shapes/infer", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "no_training_features")
        assert "familiarity" not in [row["name"] for row in without.get("/v2/models/shapes").json()["outputs"]]


def test_similar_images_are_training_images_with_thumbnails(http, familiar: Bundle, make_image) -> None:
    assert http.get("/v1/model").json()["training_images"] == 40
    (row,) = http.post("/v1/predict?similar=5", content=make_image(3)).json()["predictions"]
    assert len(row["similar"]) == 5
    first = row["similar"][0]
    assert (first["path"], first["labels"]) == ("train/3.jpg", ["class 3"])
    similarities = [image["similarity"] for image in row["similar"]]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] == pytest.approx(1, abs=2e-3)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first["thumbnail"]))), np.float32)
    seen = Engine(familiar).preprocess(make_image(3)).astype(np.float32)
    assert shown.shape == seen.shape and np.abs(shown - seen).mean() < 12
    assert http.post("/v1/predict?similar=21", content=make_image(3)).status_code == 422


def test_training_images_are_shown_only_by_a_server_with_the_option(familiar: Bundle, serving, make_image) -> None:
    with serving(create_app(familiar)) as client:
        assert client.get("/v1/model").json()["training_images"] == 0
        refused = client.post("/v1/predict?similar=2", content=make_image(1))
        assert (refused.status_code, refused.json()["code"]) == (403, "similar_disabled")


def test_unfamiliar_images_abstain_with_their_own_code_and_are_counted(familiar: Bundle, serving, make_image) -> None:
    app = create_app(familiar, min_familiarity=1.0)
    with serving(app) as client:
        known, new = (client.post("/v1/predict", content=make_image(seed)).json()["predictions"][0] for seed in (3, 60))
        metrics = app.state.service.metrics.registry
        assert known["abstain"] is False and "abstain_reasons" not in known
        assert new["familiarity"] < 1 and new["abstain"] is True and new["abstain_reasons"] == ["unfamiliar"]
        for name in ("refract_unfamiliar_total", "refract_abstained_total"):
            assert metrics.get_sample_value(name) == 1


@pytest.mark.parametrize(("limit", "warns"), [(0.01, True), (0.1, False)])
def test_a_limit_that_few_validation_images_cannot_resolve_is_reported(
    familiar: Bundle, serving, caplog: pytest.LogCaptureFixture, limit: float, warns: bool
) -> None:
    with serving(create_app(familiar, min_familiarity=limit)):
        assert ("about 5% of usual images will abstain" in caplog.text) == warns
        assert ("only 20 validation images; train with 99 or more" in caplog.text) == warns


def test_a_bundle_without_training_features_has_no_familiarity(bundle, serving, make_image) -> None:
    with serving(create_app(bundle, similar=True)) as client:
        assert client.get("/v1/model").json()["training_images"] == 0
        assert "familiarity" not in client.post("/v1/predict", content=make_image(1)).json()["predictions"][0]
        refused = client.post("/v1/predict?similar=2", content=make_image(1))
        assert (refused.status_code, refused.json()["code"]) == (422, "no_training_features")


def test_a_least_familiarity_rejects_bundles_without_training_features(familiar: Bundle, bundle) -> None:
    async def story() -> None:
        def service(engine: Engine) -> Service:
            settings = ServiceSettings(min_familiarity=0.1)
            return Service(engine, limits=Limits(), metrics=Metrics(), settings=settings)

        with pytest.raises(BundleError, match="no training features, which --min-familiarity needs"):
            await service(Engine(bundle)).start()
        started = service(Engine(familiar))
        await started.start()
        try:
            with pytest.raises(BundleError, match="no training features"):
                await started.models.swap(Engine(bundle))
        finally:
            await started.stop()

    asyncio.run(story())
