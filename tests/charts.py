"""Charts in tests: Matplotlib draws them only where DRAWN is set, as their drawing takes half of the processor time of a tiny training.

Elsewhere figures are built as always, and their files are blank images.
"""

import base64
import os
from functools import cache
from typing import Any, BinaryIO

DRAWN = "REFRACT_TESTS_DRAW_CHARTS"
"""Environment variable of tests, and of commands, that look at charts."""

BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4//8/AAX+Av4zEpUUAAAAAElFTkSuQmCC")
"""A white pixel as PNG."""


@cache
def skip_drawing() -> None:
    """Let Matplotlib's figures lay themselves out and draw only where DRAWN is set, in this process and its forks."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figures: Any = Figure
    layouts: Any = ConstrainedLayoutEngine
    save, lay_out = figures.savefig, layouts.execute

    def savefig(figure: Figure, target: BinaryIO, **options: Any) -> None:
        if os.environ.get(DRAWN):
            save(figure, target, **options)
        else:
            target.write(BLANK)

    def execute(engine: ConstrainedLayoutEngine, figure: Figure) -> None:
        if os.environ.get(DRAWN):
            lay_out(engine, figure)

    figures.savefig, layouts.execute = savefig, execute
