"""Charts in tests: Matplotlib draws them only where DRAWN is set, as their drawing takes half of the processor time of a tiny training.

Elsewhere figures are built as always, and their files are blank images.
"""

import base64
import os
from pathlib import Path
from typing import Any

DRAWN = "REFRACT_TESTS_DRAW_CHARTS"
"""Environment variable of tests, and of commands, that look at charts."""

BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4//8/AAX+Av4zEpUUAAAAAElFTkSuQmCC")
"""A white pixel as PNG."""


def skip_drawing() -> None:
    """Let Matplotlib's figures lay themselves out and draw only where DRAWN is set, in this process and its forks."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    save, lay_out = Figure.savefig, ConstrainedLayoutEngine.execute

    def savefig(figure: Any, target: Any, **options: Any) -> None:
        if os.environ.get(DRAWN):
            save(figure, target, **options)
        elif hasattr(target, "write"):
            target.write(BLANK)
        else:
            Path(target).write_bytes(BLANK)

    def execute(engine: Any, figure: Any) -> None:
        if os.environ.get(DRAWN):
            lay_out(engine, figure)

    Figure.savefig, ConstrainedLayoutEngine.execute = savefig, execute  # type: ignore[method-assign]
