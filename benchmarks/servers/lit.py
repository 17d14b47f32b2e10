"""LitServe with its batching, the same eager network; run by `benchmarks.serve`. REFRACT_BENCH_BUNDLE names the bundle."""

import base64
import os
import sys
from typing import Any

import litserve
import torch

from benchmarks.servers.peer import pixels
from refract.models.bundle.bundle import load_bundle


class Api(litserve.LitAPI):
    """Decodes in its own process for inference, in batches of at most 16 that wait for at most 5 ms."""

    def setup(self, device: str) -> None:
        self.bundle = load_bundle(os.environ["REFRACT_BENCH_BUNDLE"])
        self.classifier = self.bundle.classifier(device)

    def decode_request(self, request: dict[str, str], **_: Any) -> torch.Tensor:
        return pixels(base64.b64decode(request["image"]), self.bundle.info.network["image_size"])

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    def predict(self, images: torch.Tensor, **_: Any) -> torch.Tensor:
        with torch.inference_mode():
            return self.classifier(images).softmax(dim=1)

    def unbatch(self, outputs: torch.Tensor) -> list[torch.Tensor]:
        return list(outputs)

    def encode_response(self, output: torch.Tensor, **_: Any) -> dict[str, object]:
        best = int(output.argmax())
        return {"label": self.bundle.info.labels[best], "confidence": float(output[best])}


if __name__ == "__main__":
    api = Api(max_batch_size=16, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(sys.argv[2]))
    server.run(port=int(sys.argv[1]), host="127.0.0.1", generate_client_file=False)
