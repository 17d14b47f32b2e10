"""A server as people write it themselves: FastAPI, Pillow, torchvision's transforms, PyTorch in float32, one image at a time.

Takes the network from REFRACT_BENCH_BUNDLE, so that it answers as the others do; run by `benchmarks.serve`.
"""

import os

import torch
from fastapi import FastAPI, File, UploadFile

from benchmarks.servers.peer import pixels
from refract.models.bundle.bundle import load_bundle

bundle = load_bundle(os.environ["REFRACT_BENCH_BUNDLE"])
classifier = bundle.classifier()
app = FastAPI()


@app.get("/readyz")
def ready() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/predict")
def predict(file: UploadFile = File()) -> dict[str, object]:  # noqa: B008 — as FastAPI's own guide writes it
    image = pixels(file.file.read(), bundle.info.network["image_size"])
    with torch.inference_mode():
        probabilities = classifier(image[None]).softmax(dim=1)[0]
    best = int(probabilities.argmax())
    return {"label": bundle.info.labels[best], "confidence": float(probabilities[best])}
