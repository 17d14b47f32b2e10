"""The embedded data set `digits`: scikit-learn's 1,797 handwritten digits (UCI), 8×8 pixels with 17 grey levels, as PNG."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.source import Rows, Source

if TYPE_CHECKING:
    import numpy as np


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

        table = _table()
        pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        return Rows(
            "digits",
            [f"digits/{index:04}.png" for index in range(len(pixels))],
            labels=[str(int(number)) for number in table[:, -1]],
            images=[cv2.imencode(".png", image)[1].tobytes() for image in pixels],
        )


def _table() -> "np.ndarray":
    """Return 64 grey levels (0…16) and the number of each digit, float64 (1797, 65).

    Reads scikit-learn's own file without an import of scikit-learn, which takes longer than all else that reading the digits needs.
    """
    import numpy as np

    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("the digits belong to scikit-learn, which is not installed; pip install 'refract[train]'")
    return np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
