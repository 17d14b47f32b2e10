"""With `evaluation.images: false`, no image of the data is in the report, in MLflow's galleries or in the training features."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from small_data import COLORS, Run, make_image, write_image

from refract.models.bundle.bundle import load_bundle

IMAGES = {".jpg", ".png"}


def images_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in IMAGES}


@pytest.mark.parametrize("images", [True, False])
def test_images_of_the_data_are_only_where_the_setting_allows_them(refract: Run, tmp_path: Path, images: bool) -> None:
    for label in COLORS:
        for number in range(20):
            write_image(tmp_path / "data" / label / f"{number:02}.png", make_image(label, number))
    (tmp_path / "c.yaml").write_text(
        "data: {source: data, image_size: 16}\nmodel: {name: lenet5}\ntrainer: {max_epochs: 1, run_name: r}\n"
        f"evaluation: {{robustness: none, images: {str(images).lower()}}}\n"
    )
    assert ("preview.png" in refract("train", "c.yaml").stdout) is images
    run = tmp_path / "runs" / "r"
    report = json.loads((run / "report.json").read_text())
    assert report["metrics"]["accuracy"] < 1, "so that there is a gallery of errors"
    bundle = load_bundle(run / "bundle")
    (tracked,) = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    artifacts = Path(tracked.info.artifact_uri.removeprefix("file://"))
    charts = {"curves.png", "confusion.png"}
    for folder in (run, artifacts):
        of_data = {name for name in images_below(folder) - charts if not name.startswith("bundle/golden/")}
        assert (
            ("preview.png" in of_data and any(name.startswith("errors/") for name in of_data))
            if images
            else not of_data
        )
    refract("evaluate", "runs/r/bundle", "data", "--report", "again")
    for html in ((run / "report.html").read_text(), (tmp_path / "again" / "report.html").read_text()):
        assert ("data:image/jpeg" in html) is images and ", labelled " in html and "data:image/png" in html, (
            "charts stay"
        )
    training = bundle.training_features()
    assert training is not None and {bool(data) for data in training.thumbnails} == {images}
    assert len(training.features) == len(training.paths) > 0 < len(training.validation)
    assert bundle.golden_samples, "the self-test needs them"
