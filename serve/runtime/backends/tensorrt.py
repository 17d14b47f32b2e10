"""Backend of NVIDIA's TensorRT, through Torch-TensorRT: the network in float16, the normalisation in float32 by PyTorch."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.base import Backend, Forward

TYPICAL, LARGEST = 8, 256
"""The batch size that TensorRT optimises for, and the largest batch size of its engine."""


class _Half(nn.Module):
    """The network in float16, from normalised float32 images to float32 logits and embedding."""

    def __init__(self, network: FeatureClassifier) -> None:
        super().__init__()
        self.features = copy.deepcopy(network)
        self.features.classifier.network.half()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, embedding = self.features.recorded(self.features.classifier.network, images.half())
        return logits.float(), embedding.float()


def _build(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    """Build the engine, or read it from `folder`, where an earlier start stored it."""
    import torch_tensorrt

    classifier = network.classifier
    example = classifier.normalise(images[:2])
    shape = tuple(example.shape[1:])
    program = torch.export.export(
        _Half(network).eval(),
        (example,),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=LARGEST)},),
    )
    batches = torch_tensorrt.Input(
        min_shape=(1, *shape), opt_shape=(TYPICAL, *shape), max_shape=(LARGEST, *shape), dtype=torch.float32
    )
    engines = folder / "tensorrt"
    run = torch_tensorrt.dynamo.compile(
        program,
        arg_inputs=[batches],
        device=images.device,
        cache_built_engines=True,
        reuse_cached_engines=True,
        engine_cache_dir=str(engines),
        timing_cache_path=str(engines / "timing_cache.bin"),
    )

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits, embeddings = zip(*(run(classifier.normalise(part)) for part in batch.split(LARGEST)), strict=True)
        return (logits[0], embeddings[0]) if len(logits) == 1 else (torch.cat(logits), torch.cat(embeddings))

    return forward


BACKENDS = (
    Backend(
        "tensorrt",
        _build,
        ("cuda",),
        embeds=True,
        requires=("torch_tensorrt", "pip install torch-tensorrt, in the version of the installed torch"),
        automatic=lambda device: False,  # an engine takes minutes to build
    ),
)
