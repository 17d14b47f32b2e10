"""What 8-bit integers cost in accuracy, before and after quantisation-aware fine-tuning.

A network is trained, then fine-tuned twice from its bundle for the same epochs: with `trainer.quantization_aware` and, as the control,
without. Each of the three bundles is exported to ONNX in 8-bit integers, calibrated on its training images. The accuracies are those of
the test set.

    python -m benchmarks.quantization --data DIR --network timm/mobilenetv3_small_100 --size 64 --json benchmarks/results/quantization.json
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.report import environment, write

REFUSES_NOTHING = 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, by class, or train|test/CLASS")
    parser.add_argument("--network", default="timm/mobilenetv3_small_100")
    parser.add_argument("--weights", default="none", help="model.weights of the first training (default none)")
    parser.add_argument("--size", type=int, default=64, help="side of the input in pixels (default 64)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the first training (default 20)")
    parser.add_argument("--tune-epochs", type=int, default=5, help="epochs of each fine-tuning (default 5), 0 for none")
    parser.add_argument("--policy", default="cifar", help="augment.policy (default cifar)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="rows of other networks stay in the file")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first = trained(args, folder, "first", args.weights, args.epochs, aware=False)
        rows.append({"training": "first", "epochs": args.epochs, **first[1], **exported(args, first[0], folder)})
        for name, aware in (("fine-tuned", False), ("quantization-aware", True)) if args.tune_epochs else ():
            bundle, cost = trained(args, folder, name, str(first[0]), args.tune_epochs, aware=aware)
            rows.append({"training": name, "epochs": args.tune_epochs, **cost, **exported(args, bundle, folder)})
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.json:
        report = {
            "network": args.network, "weights": args.weights, "size": args.size, "policy": args.policy, "seed": args.seed, "rows": rows,
            "environment": environment("refract", "torch", "timm", "onnxruntime"),
        }  # fmt: skip
        write(args.json, {"networks": {**earlier(args.json), args.network: report}})


def earlier(path: Path) -> dict[str, Any]:
    """Return the reports that the file already has, by network."""
    import json

    return json.loads(path.read_text("utf-8"))["networks"] if path.is_file() else {}


def trained(
    args: argparse.Namespace, folder: Path, name: str, weights: str, epochs: int, *, aware: bool
) -> tuple[Path, dict[str, Any]]:
    """Train, and return (the bundle, its seconds)."""
    from refract.pipeline.config.config import config_from_dict
    from refract.pipeline.training.run import train

    config = config_from_dict({
        "data": {"source": str(args.data), "image_size": args.size},
        "augment": {"policy": args.policy},
        "model": {"name": args.network, "weights": weights},
        "trainer": {
            "max_epochs": epochs, "runs_dir": str(folder / "runs"), "run_name": name, "seed": args.seed, "device": "cpu",
            "precision": "fp32", "quantization_aware": aware,
        },
        "evaluation": {"robustness": "none"}, "tracking": {"enabled": False},
    })  # fmt: skip
    started = perf_counter()
    result = train(config)
    assert result is not None and result.bundle is not None
    return result.bundle, {"train_s": round(perf_counter() - started, 1)}


def exported(args: argparse.Namespace, path: Path, folder: Path) -> dict[str, Any]:
    """Return the accuracies on the test set of the bundle and of its export in 8-bit integers."""
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.export.export import export
    from refract.pipeline.export.int8 import Int8

    options = Int8(str(args.data), str(args.data), REFUSES_NOTHING)
    done = export(load_bundle(path), "onnx", folder / f"int8-{path.parent.name}", options)
    assert done.accuracy is not None
    return {
        "float32": round(done.accuracy.before, 4), "int8": round(done.accuracy.after, 4),
        "loss_points": round(done.accuracy.loss, 2), "samples": done.accuracy.samples,
    }  # fmt: skip


if __name__ == "__main__":
    main()
