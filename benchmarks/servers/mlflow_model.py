"""The network as an MLflow model with base64 pictures for its input, for `mlflow models serve`; run by `benchmarks.serve`.

    python -m benchmarks.servers.mlflow_model FOLDER

writes the model there. REFRACT_BENCH_BUNDLE names the bundle, here and where it is served.
"""

import base64
import io
import os
import sys
from typing import Any

import mlflow
import torch
from PIL import Image
from torchvision import transforms

from models.bundle import load_bundle


class Model(mlflow.pyfunc.PythonModel):
    """One request, one batch, as an MLflow model is served."""

    def load_context(self, context: mlflow.pyfunc.PythonModelContext | None) -> None:
        self.bundle = load_bundle(os.environ["REFRACT_BENCH_BUNDLE"])
        self.classifier = self.bundle.classifier()
        height, width = self.bundle.info.network["image_size"]
        steps = [
            transforms.Resize(round(height / 0.875)),
            transforms.CenterCrop((height, width)),
            transforms.PILToTensor(),
        ]
        self.transform = transforms.Compose(steps)

    def predict(self, context: mlflow.pyfunc.PythonModelContext, model_input: list[str]) -> list[dict[str, Any]]:
        files = [base64.b64decode(text) for text in model_input]
        images = torch.stack([self.transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])
        with torch.inference_mode():
            rows = self.classifier(images).softmax(dim=1)
        return [{"label": self.bundle.info.labels[int(row.argmax())], "confidence": float(row.max())} for row in rows]


if __name__ == "__main__":
    mlflow.pyfunc.save_model(sys.argv[1], python_model=__file__, pip_requirements=["mlflow"])
else:
    mlflow.models.set_model(Model())
