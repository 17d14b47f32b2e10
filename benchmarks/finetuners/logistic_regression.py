"""scikit-learn's logistic regression on the network's features, its regularisation chosen on validation."""

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform

from benchmarks.finetuners.task import answer, given, state

INVERSE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def main() -> None:
    task = given()
    network = timm.create_model(task.network, num_classes=0).eval()
    network.load_state_dict(state(task.weights), strict=True)
    transform = create_transform(task.size, mean=(task.mean,) * 3, std=(task.std,) * 3, crop_pct=0.875)

    def features(split: str) -> tuple[np.ndarray, list[str]]:
        rows = task.rows(split)
        with torch.inference_mode():
            vectors = [network(transform(Image.open(path).convert("RGB"))[None])[0].numpy() for path, _ in rows]
        return np.stack(vectors), [label for _, label in rows]

    parts = {split: features(split) for split in ("train", "val", "test")}
    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(*parts["train"])
        for strength in INVERSE_STRENGTHS
    ]
    best = max(fitted, key=lambda model: model.score(*parts["val"]))
    answer(float(best.score(*parts["test"])))


if __name__ == "__main__":
    main()
