"""Compare the JavaScript preprocessing of an export with Refract's on the bundle's own images, if Node.js is installed."""

import base64
import json
import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refract.augment import Preprocess
from refract.augment.decoding.decode import decode
from refract.pipeline.export.target import ExportError

LEVELS = 1
"""Largest allowed difference of a pixel, in grey levels: docs/preprocessing.md."""

MOST_IMAGES, NODE_S = 4, 120

_PROGRAM = """
const { refractPreprocess } = require(process.argv[1]);
const { images, settings } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const run = ({ data, width, height }) => refractPreprocess({ data: Buffer.from(data, "base64"), width, height }, settings);
console.log(JSON.stringify(images.map((image) => Buffer.from(run(image)).toString("base64"))));
"""

log = logging.getLogger(__name__)


def check_script(script: Path, encoded: Sequence[bytes], preprocess: Preprocess) -> bool:
    """Run the script on the first encoded images, and return whether Node.js could.

    ExportError if a pixel differs from those of `preprocess` by more than LEVELS.
    """
    node = shutil.which("node")
    if node is None:
        log.info("the JavaScript preprocessing was not checked: Node.js is not installed")
        return False
    images = [decode(data, color_profile=preprocess.color_profile) for data in encoded[:MOST_IMAGES]]
    given = {"images": [_plain(image) for image in images], "settings": {"preprocess": preprocess.to_dict()}}
    try:
        command = [node, "-e", _PROGRAM, str(script.absolute())]
        done = subprocess.run(
            command, input=json.dumps(given), capture_output=True, text=True, timeout=NODE_S, check=True
        )
        results = [base64.b64decode(result) for result in json.loads(done.stdout)]
    except (subprocess.SubprocessError, OSError, ValueError) as err:
        log.warning("the JavaScript preprocessing was not checked: Node.js fails: %s", type(err).__name__)
        return False
    for image, result in zip(images, results, strict=True):
        expected = preprocess(image)
        got = np.frombuffer(result, np.uint8).reshape(expected.shape).astype(int)
        if (largest := int(np.abs(got - expected).max())) > LEVELS:
            raise ExportError(
                f"--to web: {script.name} changes a pixel of a golden sample by {largest} grey levels; at most {LEVELS} is allowed; "
                "use --to onnx"
            )
    return True


def _plain(image: np.ndarray) -> dict[str, Any]:
    height, width = image.shape[:2]
    return {"data": base64.b64encode(image.tobytes()).decode(), "width": width, "height": height}
