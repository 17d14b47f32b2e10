"""A model that was trained with another library's resize answers a client of that library as `refract predict` does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import Run, paint
from torchvision.io import decode_image
from torchvision.transforms import v2

pytestmark = pytest.mark.slow

SIDE = 64


def trained(refract: Run, interpolation: str) -> tuple[list[Path], np.ndarray]:
    """Train on images of different sizes. Returns (images, the probabilities that `refract predict` gives)."""
    paint(Path("images"), range(8))
    files = sorted(Path("images").rglob("*.png"))
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        image.resize((90 + 7 * number, 120), Image.Resampling.BICUBIC).save(file)
    config = {
        "data": {"source": "images", "image_size": SIDE, "interpolation": interpolation, "workers": 0, "memory": "never"},
        "augment": {"policy": [{"RandomResizedCrop": {"size": SIDE}}, "HorizontalFlip"]},
        "model": {"name": "timm/test_resnet"},
        "trainer": {"max_epochs": 1, "run_name": "run", "device": "cpu"},
        "tracking": {"enabled": False}, "evaluation": {"robustness": "none"},
    }  # fmt: skip
    Path("config.yaml").write_text(json.dumps(config), "utf-8")
    refract("train", "config.yaml")
    record = json.loads(Path("runs/run/bundle/bundle.json").read_text("utf-8"))
    assert record["preprocess"]["interpolation"] == interpolation
    done = refract("predict", "runs/run/bundle", *map(str, files[::4]), "--json")
    tops = [json.loads(line)["top"] for line in done.stdout.splitlines()]
    rows = [{entry["label"]: entry["confidence"] for entry in top} for top in tops]
    return files[::4], np.array([[row[label] for label in record["labels"]] for row in rows])


def test_timms_own_transform_and_network(refract: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    files, expected = trained(refract, "pillow")
    refract("export", "runs/run/bundle", "--to", "hf", "-o", "hf")
    assert "timm's own evaluation transform gives the same pixels as `preprocess.py`." in Path(
        "hf/README.md"
    ).read_text("utf-8")
    network = timm.create_model("local-dir:hf", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    temperature = json.loads(Path("hf/preprocess.json").read_text("utf-8"))["temperature"]
    with torch.inference_mode():
        logits = network(torch.stack([transform(Image.open(file)) for file in files]))
    np.testing.assert_allclose((logits / temperature).softmax(dim=1), expected, atol=1e-4)


def test_torchvisions_tensors_and_the_torch_export(
    refract: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files, expected = trained(refract, "torchvision")
    refract("export", "runs/run/bundle", "--to", "torch-export", "-o", "exported")
    transform = v2.Compose([v2.Resize(int(SIDE / 0.875), antialias=True), v2.CenterCrop(SIDE)])
    images = torch.stack([transform(decode_image(str(file))) for file in files]).permute(0, 2, 3, 1)
    program = torch.export.load("exported/model.pt2").module()
    probabilities, _ = program(images.contiguous())
    np.testing.assert_allclose(probabilities.detach(), expected, atol=1e-4)
