"""The Python blocks of docs/augment-in-your-loop.md run in order."""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from warm_process import shared

TEXT = (Path(__file__).parents[2] / "docs" / "augment-in-your-loop.md").read_text("utf-8")


def test_the_blocks_run_in_order(tmp_path: Path) -> None:
    """Runs in a separate process: the page sets OpenCV's threads and forks workers."""
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 256, (72, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.jpg")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    code = (
        "\n".join(blocks) + "\nassert moved_mask.shape == moved_image.shape[:2] == (48, 48)\nassert len(images) == 4\n"
    )
    process = shared().popen([], cwd=tmp_path, code=code)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert "plain indices" not in err
