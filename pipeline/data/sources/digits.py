"""The embedded data set `digits`: scikit-learn's 1,797 handwritten digits (UCI), 8×8 pixels with 17 grey levels, as PNG."""

from pathlib import Path
from typing import ClassVar

from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.source import Rows, Source


class DigitsSource(Source):
    accepts: ClassVar[str] = "`digits`"
    embedded: ClassVar[bool] = True

    @classmethod
    def recognises(cls, name: str) -> bool:
        return name == "digits" and not Path(name).exists()

    def check_task(self, task: str) -> None:
        if task not in ("auto", "multiclass"):
            raise DataError(
                f"data.task: {task} does not fit the digits, which have ten classes; set auto or multiclass"
            )

    def rows(self, *, labelled: bool) -> Rows:
        import cv2
        import numpy as np
        from sklearn.datasets import load_digits

        images, numbers = load_digits(return_X_y=True)
        pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        return Rows(
            "digits",
            [f"digits/{index:04}.png" for index in range(len(pixels))],
            labels=[str(number) for number in numbers],
            images=[cv2.imencode(".png", image)[1].tobytes() for image in pixels],
        )
