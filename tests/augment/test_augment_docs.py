"""The policies, ops and lists of docs/augment.md match the code."""

import re
from pathlib import Path

import numpy as np
import yaml

from refract.augment import Augmenter, load_policy, presets
from refract.augment.ops import color
from refract.augment.ops.base import Args, Size, between, interval
from refract.augment.registry import OPS

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "augment.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_documented_policies_load_and_run() -> None:
    policies = [load_policy(yaml.safe_load(text)) for text in blocks("yaml")]
    assert len(policies) == 3 and policies[0].exact
    image = np.full((300, 400, 3), 90, np.uint8)
    for policy in policies:
        for epoch in (0, 10, 90):
            Augmenter(policy)(image, epoch=epoch, index=0)
            Augmenter(policy).text("some words of a caption", epoch=epoch, index=0)


def test_the_documented_op_works() -> None:
    example = next(text for text in blocks("python") if "class Sepia" in text)
    space = {**vars(color), "Args": Args, "Size": Size, "between": between, "interval": interval}
    exec(example, space)
    op = space["Sepia"](amount=1.0)
    matrix = op.color(op.draw(np.random.default_rng(0), (9, 9)), np.zeros(3))
    red, green, blue = matrix[:3, :3] @ np.array([100.0, 100, 100])
    assert red > green > blue


def test_every_op_is_in_the_gallery_and_every_preset_is_named() -> None:
    gallery = (DOCS / "make_gallery.py").read_text()
    assert "for name, op in OPS.items()" in gallery
    assert all(f"`{name}`" in TEXT for name, op in OPS.items() if op.kind == "text")
    for kind in {op.kind for op in OPS.values()} - {"text"}:
        assert f"gallery/{kind}.jpg" in TEXT and (DOCS / "gallery" / f"{kind}.jpg").stat().st_size > 5000
    assert all(f"`{name}`" in TEXT for name in presets())
