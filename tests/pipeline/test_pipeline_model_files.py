"""The files of the MLflow model, the model card and the gallery of errors, without a training."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from small_data import make_image, write_image

from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation.error_images import write_error_images
from refract.pipeline.evaluation.report import Report
from refract.pipeline.inference.pyfunc import _load_pyfunc
from refract.pipeline.tracking.mlflow_model import requirements
from refract.pipeline.tracking.model_card import _cell
from tests.pipeline.test_pipeline_score import make_bundle


def test_an_unknown_plugin_or_column_is_reported(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(ValueError, match="plugin none.py: cannot be read"):
        _load_pyfunc(str(bundle), {"plugins": "none.py"})
    with pytest.raises(ValueError, match="expected a table with the column image, received the columns file"):
        _load_pyfunc(str(bundle)).predict(pd.DataFrame({"file": [b"x"]}))


def test_pixels_in_place_of_a_file_are_reported_and_missing_values_are_no_image(tmp_path: Path) -> None:
    model = _load_pyfunc(str(make_bundle(tmp_path / "bundle")))
    rows = [np.zeros((8, 8, 3), np.uint8), [1, 2], 3, float("nan"), pd.NA, None]
    errors = model.predict(pd.DataFrame({"image": pd.Series(rows, dtype=object)})).error.tolist()
    for error, kind in zip(errors, ("ndarray", "list", "int"), strict=False):
        assert error.endswith(f"the image is a {kind}; expected the bytes of an image file, or their base64 text")
    assert errors[3:] == ["the row has neither an image nor a text"] * 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 0}, "batch_size: received 0; expected a whole number of at least 1"),
        ({"batch_size": "8"}, "batch_size: received '8'; expected a whole number"),
        ({"device": "tpu"}, "device: received 'tpu'; expected auto, cpu or cuda"),
        ({"plugins": None}, "plugins: received None; expected a list"),
    ],
)
def test_a_wrong_setting_is_reported_when_the_model_is_loaded(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        _load_pyfunc(str(make_bundle(tmp_path / "bundle")), settings)


def test_names_of_error_images_are_safe_and_damaged_images_are_skipped(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", make_image("red", 0, side=600))
    (tmp_path / "b.png").write_bytes(b"damaged")
    rows = [
        {"src": "", "caption": 'a/b\\..<x>: 97%, labelled ü|"?*' + "é" * 200, "path": str(tmp_path / "a.png")},
        {"src": "", "caption": "cat 50%, labelled dog", "path": str(tmp_path / "b.png")},
        {"src": "", "caption": "cat 40%, labelled dog: “secret text”", "path": str(tmp_path / "c.png")},
    ]
    samples = [Sample(str(tmp_path / name), (0,)) for name in ("a.png", "b.png")]
    samples.append(Sample(str(tmp_path / "c.png"), (0,), has_image=False))
    report = Report("t", {}, galleries={"Most confident errors": rows})
    folder = write_error_images(report, samples, tmp_path)
    assert folder is not None
    (name,) = [file.name for file in folder.iterdir()]
    assert name.startswith("01 a b ..") and not set(name) & set('/\\<>|"?*%:') and len(name.encode()) <= 104
    assert max(cv2.imread(str(folder / name)).shape) == 256
    assert write_error_images(Report("t", {}), samples, tmp_path / "other") is None
    (tmp_path / "none").mkdir()
    all_damaged = Report("t", {}, galleries={"Most confident errors": rows[1:2]})
    assert write_error_images(all_damaged, samples, tmp_path / "none") is None and not [*(tmp_path / "none").iterdir()]


def test_labels_of_the_card_neither_break_a_table_nor_load_an_image() -> None:
    assert _cell("a|b\n<script>![x](http://x/y.png)") == r"a\|b &lt;script>![x]\(http://x/y.png)"


def test_requirements_name_a_package_that_is_not_installed_without_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "transformers":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("refract.pipeline.tracking.mlflow_model.version", installed)
    assert requirements({"torch": "2.15.0"}, text=True)[-1] == "transformers"


def test_requirements_are_those_of_a_prediction() -> None:
    lines = requirements({"python": "3.11.7", "lightning": "2.6.6", "torch": "2.15.0+cu130", "refract": "0.1.0"})
    assert lines[:2] == ["torch==2.15.0", "refract==0.1.0"] and any(line.startswith("mlflow==") for line in lines)
    assert not any(line.startswith(("python", "lightning")) for line in lines)
    assert any(line.startswith("transformers==") for line in requirements({}, text=True))
