"""The network as an MLflow model with base64 images for its input, for `mlflow models serve`; run by `benchmarks.serve`.

    python -m benchmarks.servers.mlflow_model FOLDER

writes the model there. REFRACT_BENCH_BUNDLE names the bundle, here and where it is served.
"""

import base64
import os
import sys
from typing import Any

import mlflow
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

from benchmarks.servers.peer import pixels
from refract.models.bundle.bundle import load_bundle


class Model(PythonModel):
    """One request, one batch, as an MLflow model is served."""

    def load_context(self, context: PythonModelContext | None) -> None:
        self.bundle = load_bundle(os.environ["REFRACT_BENCH_BUNDLE"])
        self.classifier = self.bundle.classifier()

    # MLflow derives the schema from this signature.
    def predict(self, context: PythonModelContext, model_input: list[str]) -> list[dict[str, Any]]:  # type: ignore[override]
        size = self.bundle.info.network["image_size"]
        images = torch.stack([pixels(base64.b64decode(text), size) for text in model_input])
        with torch.inference_mode():
            rows = self.classifier(images).softmax(dim=1)
        return [{"label": self.bundle.info.labels[int(row.argmax())], "confidence": float(row.max())} for row in rows]


if __name__ == "__main__":
    mlflow.pyfunc.save_model(sys.argv[1], python_model=__file__, pip_requirements=["mlflow"])
else:
    mlflow.models.set_model(Model())
