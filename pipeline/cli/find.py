"""`refract find lr|batch-size CONFIG [--section.key value …]`"""

import sys

from refract.pipeline.cli import console


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in ("lr", "batch-size"):
        print("usage: refract find lr|batch-size CONFIG.yaml [--section.key value …]\n")
        print(
            "Try learning rates from small to large, one step each, and say where the loss falls fastest; or find the largest"
        )
        print("batch whose steps fit the device's memory. Trains nothing for good and writes nothing.")
        asked = bool(argv) and argv[0] in ("-h", "--help")
        return 0 if asked or (len(argv) == 2 and argv[1] in ("-h", "--help")) else 2
    return console.run("find", lambda: _find(argv[0], argv[1], argv[2:]))


def _find(what: str, path: str, overrides: list[str]) -> int:
    from refract.pipeline.config.config import load_config
    from refract.pipeline.training.finders import find_batch_size, find_lr

    config = load_config(path, overrides)
    if what == "batch-size":
        size = find_batch_size(config)
        print(f"the largest batch that fits: {size}; --data.batch_size {size}")
        return 0
    found = find_lr(config)
    print("learning rate    loss, smoothed", file=sys.stderr)
    for lr, loss in list(zip(found.lrs, found.losses, strict=True))[:: max(1, len(found.lrs) // 12)]:
        print(f"{lr:13.2e}    {loss:.4f}", file=sys.stderr)
    print(f"the loss falls fastest at a learning rate of {found.suggestion:.2g}; try --optim.lr {found.suggestion:.2g}")
    return 0
