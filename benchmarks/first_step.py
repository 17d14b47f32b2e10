"""Run `refract` with this program's arguments up to the first optimizer step of the training loop, print STEP and exit.

The program exits when its standard input has a line or has ended, so that the memory of all its processes can be read until then.
The steps of the doctor's check before the loop do not count.
"""

import os
import sys
from types import FrameType

LOOPS = os.path.join("lightning", "pytorch", "loops")  # noqa: PTH118 — a part of file names


def end_in_loop(*_: object) -> None:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if LOOPS in frame.f_code.co_filename:
            print("STEP", flush=True)
            sys.stdin.readline()
            os._exit(0)
        frame = frame.f_back


if __name__ == "__main__":  # the loader's worker processes import this module, too
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from refract.cli import main

    register_optimizer_step_pre_hook(end_in_loop)
    sys.exit(f"the training ended before its first step, with exit code {main(sys.argv[1:])}")
