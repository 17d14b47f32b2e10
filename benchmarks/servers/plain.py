"""A server as people write it themselves: FastAPI, Pillow, torchvision's transforms, PyTorch in float32, one picture at a time.

Takes the network from REFRACT_BENCH_BUNDLE, so that it answers as the others do; run by `benchmarks.serve`.
"""

import io
import os

import torch
from fastapi import FastAPI, File, UploadFile
from PIL import Image
from torchvision import transforms

from models.bundle import load_bundle

bundle = load_bundle(os.environ["REFRACT_BENCH_BUNDLE"])
classifier = bundle.classifier()
height, width = bundle.info.network["image_size"]
transform = transforms.Compose(
    [transforms.Resize(round(height / 0.875)), transforms.CenterCrop((height, width)), transforms.PILToTensor()]
)
app = FastAPI()


@app.get("/readyz")
def ready() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/predict")
def predict(file: UploadFile = File()) -> dict[str, object]:  # noqa: B008 — as FastAPI's own guide writes it
    image = Image.open(io.BytesIO(file.file.read())).convert("RGB")
    with torch.inference_mode():
        probabilities = classifier(transform(image)[None]).softmax(dim=1)[0]
    best = int(probabilities.argmax())
    return {"label": bundle.info.labels[best], "confidence": float(probabilities[best])}
