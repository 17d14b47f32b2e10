"""Evaluations of many classes: the numbers of the textbook formulas without arrays of classes by classes, and reports that stay small."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import classification_report, confusion_matrix, top_k_accuracy_score

from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.confusion import Confusion
from refract.pipeline.evaluation.evaluate import Evaluation, measured
from refract.pipeline.evaluation.label_errors import confident_learning
from refract.pipeline.evaluation.report import make_report

CLASSES = 7

PREDICTIONS = st.integers(1, 40).flatmap(
    lambda count: st.tuples(
        arrays(np.float32, (count, CLASSES), elements=st.integers(1, 6).map(lambda part: np.float32(part / 8))),
        arrays(np.int64, count, elements=st.integers(0, CLASSES - 1)),
    )
)
"""Few distinct values, so that many are equal."""


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """Predictions of 300 classes, of which every third is wrong."""
    truth = np.arange(600) % 300
    probabilities = np.random.default_rng(0).uniform(0.0005, 0.001, (600, 300)).astype(np.float32)
    probabilities[np.arange(600), np.where(np.arange(600) % 3 == 0, (truth + 1) % 300, truth)] = 0.7
    image = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    samples = [Sample(f"{i}.png", (int(label),), "test", data=image) for i, label in enumerate(truth)]
    return measured(probabilities, samples, task="multiclass", labels=[f"class {i}" for i in range(300)])


@given(PREDICTIONS)
def test_cells_are_those_of_the_matrix(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    probabilities, truth = drawn
    predicted = probabilities.argmax(axis=1)
    confusion, matrix = (
        Confusion.of(truth, predicted, CLASSES),
        confusion_matrix(truth, predicted, labels=range(CLASSES)),
    )
    assert (confusion.matrix == matrix).all()
    errors = matrix - np.diag(np.diag(matrix))
    assert [count for *_, count in confusion.most_frequent_errors(3)] == sorted(errors[errors > 0], reverse=True)[:3]
    assert all(errors[true, guess] == count for true, guess, count in confusion.most_frequent_errors(3))


@given(PREDICTIONS, st.integers(1, CLASSES))
def test_blocks_do_not_change_a_number(drawn: tuple[np.ndarray, np.ndarray], count: int) -> None:
    probabilities, truth = drawn
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    whole = confident_learning(probabilities, truth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "AT_ONCE", 2 * CLASSES)
        assert measures.top_accuracy(probabilities, truth, count) == (best == truth[:, None]).any(axis=1).mean()
        assert all(map(np.array_equal, confident_learning(probabilities, truth), whole))
    mean_own = [
        probabilities[truth == c, c].mean(dtype=np.float64) if (truth == c).any() else 2 for c in range(CLASSES)
    ]
    for i in whole[0]:
        others = [c for c in range(CLASSES) if c != truth[i] and probabilities[i, c] >= mean_own[c] - 1e-6]
        assert max(probabilities[i, others]) > probabilities[i, truth[i]]


def test_metrics_of_300_classes_equal_those_of_scikit_learn(evaluation: Evaluation) -> None:
    truth, predicted = evaluation.truth, evaluation.probabilities.argmax(axis=1)
    expected = classification_report(truth, predicted, output_dict=True, zero_division=0)
    for index, row in enumerate(evaluation.per_class):
        assert [row["precision"], row["recall"], row["f1"], row["count"]] == pytest.approx(
            [expected[str(index)][key] for key in ("precision", "recall", "f1-score", "support")]
        )
    assert evaluation.metrics["top5_accuracy"] == pytest.approx(
        top_k_accuracy_score(truth, evaluation.probabilities, k=5)
    )


def test_a_report_of_300_classes_stays_small(evaluation: Evaluation, tmp_path: Path) -> None:
    labels = [row["label"] for row in evaluation.per_class]
    report = make_report("Many", evaluation, labels, facts={}, precision=0.95, abstain_below=0.5, images=False)
    html, data = (path.read_text("utf-8") for path in report.write(tmp_path))
    assert "The 200 of 300 classes with the lowest F1" in html
    assert html.count("<td>class ") == 200
    numbers = json.loads(data)
    assert "confusion" not in numbers and len(numbers["per_class"]) == 300
    assert ["class 0", "class 1", 2] in numbers["confusion_cells"]
    assert sum(count for *_, count in numbers["confusion_cells"]) == 600
    assert report.png("Confusion matrix").startswith(b"\x89PNG")
