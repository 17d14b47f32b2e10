"""The model card of an export for the Hugging Face Hub."""

import json
import re

from refract.models.bundle.info import BundleInfo

SHOWN_LABELS = 100


def model_card(info: BundleInfo, digest: str) -> str:
    """Describe the bundle `info` with the SHA-256 `digest` in Markdown, with the front matter that the Hub reads."""
    front = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "refract"],
    }
    height, width = info.network["image_size"]
    labels = ", ".join(map(_code, info.labels[:SHOWN_LABELS]))
    more = f" and {len(info.labels) - SHOWN_LABELS:,} more" if len(info.labels) > SHOWN_LABELS else ""
    function = "sigmoid()" if info.task == "multilabel" else "softmax(dim=1)"
    decision = ", and thresholds has one limit for each label" if info.task == "multilabel" else ""
    transform = (
        "For RGB images without transparency, orientation or profile,\n"
        "timm's own evaluation transform gives the same pixels as `preprocess.py`."
        if info.preprocess.get("interpolation") == "pillow"
        else "timm's own transform resizes to other pixels, which changes probabilities;\n`preprocess.py` computes those of the training."
    )
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in info.metrics.items())
    return f"""---
{json.dumps(front, indent=2)}
---

# {_code(info.name)}

An image classifier, task {info.task}: `{info.network["name"]}` for {height}×{width} pixels, trained with Refract.
Its bundle has the SHA-256 `{digest}`.

Labels: {labels}{more}.

## Use

```python
import json
import timm
import torch
from preprocess import preprocess  # preprocess.py of this folder

settings = json.load(open("preprocess.json"))
network = timm.create_model("local-dir:.", pretrained=True).eval()
mean, std = (torch.tensor(settings["preprocess"][name]).view(1, 3, 1, 1) for name in ("mean", "std"))
image = torch.from_numpy(preprocess("photo.jpg", settings)).permute(2, 0, 1)[None]
with torch.inference_mode():
    logits = network((image / 255 - mean) / std)
probabilities = (logits / settings["temperature"]).{function}
```

`preprocess.json` has the labels and the temperature{decision}. {transform}

## Measured

On the test set of the training:

| metric | value |
|---|---|
{metrics}
"""


def _code(text: str) -> str:
    """Return the text as one line of Markdown's code, in which nothing is markup."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"
