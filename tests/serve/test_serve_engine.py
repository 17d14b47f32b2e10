"""An engine reproduces the stored probabilities of its bundle, or its self-test names the golden sample that differs."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from refract.models.bundle.bundle import BundleError, GoldenSample
from refract.models.classifier import probabilities
from refract.pipeline.inference.scoring import SampleInput, score
from refract.serve.http.app import create_app
from refract.serve.runtime.engine import Engine, build
from refract.serve.runtime.outputs import unpacked


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_batch_gives_the_same_predictions_as_single_images(make_bundle, make_image, reference, tmp_path, task):
    bundle = make_bundle(tmp_path / "b", task=task, thresholds=[0.5] * 10 if task == "multilabel" else ())
    engine = Engine(bundle)
    batch = np.stack([engine.preprocess(make_image(i)) for i in range(5)])
    before, answers = batch.copy(), engine.predict(batch)
    assert (answers.shape, answers.dtype) == ((5, 10), np.float32)
    np.testing.assert_array_equal(batch, before)
    for i in range(5):
        np.testing.assert_allclose(answers[i], reference(bundle.classifier("cpu"), make_image(i), task), atol=1e-6)


def test_the_self_test_passes_on_its_own_golden_samples(bundle):
    Engine(bundle).self_test()


def test_the_self_test_names_the_image_that_differs(bundle):
    good, bad = bundle.golden_samples[0], bundle.golden_samples[1]
    other = GoldenSample(bad.name, bad.data, tuple(reversed(bad.probabilities)))
    engine = Engine(dataclasses.replace(bundle, golden_samples=(good, other)))
    with pytest.raises(BundleError, match=r"golden sample 01\.jpg is predicted as 'class \d', stored is 'class \d'"):
        engine.self_test()


def test_the_self_test_allows_exactly_the_tolerance(bundle):
    def shifted(by: float) -> Engine:
        golden = bundle.golden_samples[0]
        answers = np.array(golden.probabilities)
        answers[answers.argmax()] -= by
        return Engine(
            dataclasses.replace(bundle, golden_samples=(GoldenSample("x.jpg", golden.data, tuple(answers.tolist())),))
        )

    shifted(0.0015).self_test()
    with pytest.raises(BundleError, match=r"differ by 0\.0025"):
        shifted(0.0025).self_test()


def test_nan_probabilities_fail_the_self_test(bundle):
    engine = Engine(bundle)
    with torch.no_grad():
        engine._classifier.mean.fill_(float("nan"))
    with pytest.raises(BundleError, match="golden sample"):
        engine.self_test()


@pytest.mark.parametrize(
    ("golden_samples", "message"),
    [((), "no golden samples"), ((GoldenSample("a.jpg", b"no image", (0.1,) * 10),), "a.jpg cannot be decoded")],
)
def test_missing_or_invalid_golden_samples_are_rejected(bundle, golden_samples, message):
    with pytest.raises(BundleError, match=message):
        Engine(dataclasses.replace(bundle, golden_samples=golden_samples)).self_test()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("loud", [1, 400], ids=["unsure", "sure"])
def test_flip_tta_gives_the_probabilities_of_evaluation(make_bundle, serving, make_image, tmp_path, task, loud):
    """loud: factor of the logits; 400 makes the probabilities 0 and 1 in float32."""
    bundle = make_bundle(tmp_path / "b", task=task, thresholds=[0.5] * 10 if task == "multilabel" else ())
    engine = Engine(bundle)
    with torch.no_grad():
        last = [layer for layer in engine._classifier.modules() if isinstance(layer, torch.nn.Linear)][-1]
        last.weight.mul_(loud)
        last.bias.mul_(loud)
    data, info = [make_image(i) for i in range(8)], bundle.info
    questions = [SampleInput(lambda one=one: one) for one in data]
    options = {"task": task, "temperature": info.temperature, "tta": "flip"}
    wanted = np.stack(list(score(engine._classifier, engine.preprocess, questions, **options)))
    inputs = np.stack([engine.preprocess(one) for one in data])
    straight, flipped = (engine.compute(views) for views in (inputs, inputs[:, :, ::-1].copy()))
    np.testing.assert_allclose(engine.mean(straight, flipped)["probabilities"], wanted, atol=1e-6)
    app = create_app(engine)
    app.state.service.models.engine.self_test = lambda: 0.01  # its golden samples are of the network with factor 1
    with serving(app) as client:
        answer = client.post("/v1/predict?tta=flip&top=10", files=[("f", ("x.jpg", one)) for one in data])
    for row, prediction in zip(wanted, answer.json()["predictions"], strict=True):
        by_label = {entry["label"]: entry["confidence"] for entry in prediction["top"]}
        np.testing.assert_allclose([by_label[label] for label in info.labels], row, atol=1e-5)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_mean_of_opposite_logits_is_the_more_confident_prediction(make_bundle, tmp_path, task):
    bundle = make_bundle(tmp_path / "b", task=task, thresholds=[0.5] * 10 if task == "multilabel" else ())
    engine = Engine(dataclasses.replace(bundle, info=dataclasses.replace(bundle.info, temperature=1.0)))
    one, other = np.zeros((2, 1, 10), np.float32)
    one[0, 0], other[0, 0], other[0, 1] = 60, -40, 40
    wanted = probabilities(torch.from_numpy((one + other) / 2), task=task).numpy()
    views = [
        unpacked(np.concatenate([logits, logits, [[k, 1, k]]], axis=1, dtype=np.float32), 10)
        for k, logits in enumerate((one, other))
    ]
    mean = engine.mean(*views)
    np.testing.assert_array_equal(mean["probabilities"], wanted)
    np.testing.assert_array_equal(mean["embedding"], [[0.5, 1]])


def test_replicas_give_the_same_predictions_and_are_all_self_tested(bundle, serving, make_image, monkeypatch) -> None:
    threads = torch.get_num_threads()
    engine = build(bundle, ["cpu", "cpu"], replicas=2)
    assert engine.devices == ("cpu",) * 4 and len(engine.workers) == 4
    batch = np.stack([engine.preprocess(make_image(i)) for i in range(3)])
    for worker in engine.workers:
        np.testing.assert_array_equal(worker(batch)["probabilities"], engine.predict(batch))
    with serving(create_app(engine)) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: client.post("/v1/predict?top=1", content=make_image(i % 3)), range(40)))
        rows = engine.predict(batch)
        for i, answer in enumerate(answers):
            assert answer.json()["predictions"][0]["confidence"] == pytest.approx(rows[i % 3].max(), abs=1e-5)
        assert client.get("/v1/model").json()["device"] == "cpu, cpu, cpu, cpu"
    monkeypatch.setattr(engine.others[2], "_outputs", lambda *_: unpacked(np.zeros((1, 21), np.float32), 10))
    with pytest.raises(BundleError, match="golden sample"):
        engine.self_test()
    torch.set_num_threads(threads)
