"""The Python blocks of docs/augment-in-your-loop.md run in order."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

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
    script = tmp_path / "page.py"
    script.write_text(code, "utf-8")
    process = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "plain indices" not in process.stderr
