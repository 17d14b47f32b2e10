"""`refract find lr|batch-size CONFIG [--section.key value …]`"""

import sys

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in ("lr", "batch-size"):
        print("usage: refract find lr|batch-size CONFIG.yaml [--section.key value …]\n")
        print("lr          Train one step at each of many rising learning rates; report where the loss falls fastest.")
        print("batch-size  Find the largest batch whose training step fits the device's memory.\n")
        print("The command writes no files and keeps no weights.")
        wants_help = bool(argv) and argv[0] in ("-h", "--help")
        return 0 if wants_help or (len(argv) == 2 and argv[1] in ("-h", "--help")) else 2
    return console.run("find", lambda: _find(argv[0], argv[1], argv[2:]))


def _find(target: str, path: str, overrides: list[str]) -> int:
    from refract.pipeline.config.config import load_config
    from refract.pipeline.training.finders import find_batch_size, find_lr

    config = load_config(path, overrides)
    if target == "batch-size":
        size = find_batch_size(config)
        print(f"largest batch that fits: {size}; set --data.batch_size {size}")
        output.result({"batch_size": size})
        return 0
    result = find_lr(config)
    print("learning rate    smoothed loss", file=sys.stderr)
    for lr, loss in list(zip(result.lrs, result.losses, strict=True))[:: max(1, len(result.lrs) // 12)]:
        print(f"{lr:13.2e}    {loss:.4f}", file=sys.stderr)
    output.result({"lr": result.suggestion, "lrs": result.lrs, "losses": result.losses})
    print(f"the loss falls fastest at learning rate {result.suggestion:.2g}; try --optim.lr {result.suggestion:.2g}")
    return 0
