"""Draw the images of a review: as a JPEG of a limited size, and under the heat map of a bundle."""

import threading

import cv2
import numpy as np
import torch

from refract.augment.decoding.decode import decode_part, image_size
from refract.models.bundle.bundle import Bundle
from refract.models.occlusion import Occlusion
from refract.pipeline.inference.scoring import preprocess_of

QUALITY = 88
"""Of the JPEGs."""

METHOD = "occlusion"


def rendered(data: bytes, longest: int) -> bytes:
    """Encode an image file as a JPEG whose longer side has at most `longest` pixels. ImageError for a file that is not an image.

    The image is decoded, so that nothing of the file itself reaches the browser.
    """
    side = max(image_size(data))
    reduced = next(
        (factor for factor in (8, 4, 2) if side >= factor * longest), 1
    )  # decodes a large JPEG in a fraction of the time
    pixels = decode_part(data, None, scale=reduced).pixels
    scale = min(1.0, longest / max(pixels.shape[:2]))
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])


class HeatMaps:
    """Heat maps of one bundle, which reads images alone. One is computed at a time."""

    def __init__(self, bundle: Bundle) -> None:
        info = bundle.info
        self._classifier, self._preprocess = bundle.classifier(), preprocess_of(info)
        self._lock = threading.Lock()
        self._occlusion = Occlusion(
            self._classifier, multilabel=info.task == "multilabel", temperature=info.temperature
        )

    def __call__(self, data: bytes) -> tuple[bytes, str] | None:
        """Return (PNG of the network's input under the heat map of the most probable label, the method), None without evidence."""
        pixels = self._preprocess(data)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        with self._lock, torch.inference_mode():
            label = int(self._classifier(image[None]).argmax())
            heat = self._occlusion.heat(image, label)
        if not heat.any():
            return None
        weight = heat.numpy()[:, :, None] * 0.7
        colours = cv2.applyColorMap((heat.numpy() * 255).astype(np.uint8), cv2.COLORMAP_JET)
        blended = pixels[:, :, ::-1] * (1 - weight) + colours * weight
        return bytes(cv2.imencode(".png", blended.astype(np.uint8))[1]), METHOD
