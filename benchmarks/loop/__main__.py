"""Measure the loop of review, correction and feedback, one stage at a time.

    python -m benchmarks.loop --stage live --json benchmarks/results/loop_live.json
    python -m benchmarks.loop --stage label-errors --data CIFAR --json benchmarks/results/loop_label_errors.json
    python -m benchmarks.loop --stage active --data CIFAR --json benchmarks/results/loop_active.json
    python -m benchmarks.loop --stage queue --json benchmarks/results/loop_queue.json

The stages are described in the modules of this package. CIFAR has train|test/CLASS/…; its embeddings are kept in --store.
label-errors compares with cleanlab if it can be imported, also from a separate folder on PYTHONPATH.
"""

import argparse
from pathlib import Path

from benchmarks.loop import active, label_errors, live, queue

STAGES = {"live": live.main, "label-errors": label_errors.main, "active": active.main, "queue": queue.main}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), default="live")
    parser.add_argument("--predictions", type=int, default=100_000, help="live: predictions in a repetition")
    parser.add_argument("--fraction", type=float, default=0.01, help="live: fraction of the predictions with feedback")
    parser.add_argument("--repetitions", type=int, default=1000, help="live")
    parser.add_argument("--data", type=Path, help="label-errors, active: folder with train|test/CLASS/…")
    parser.add_argument("--store", type=Path, default=Path("features"), help="label-errors, active: feature store")
    parser.add_argument("--seeds", type=int, default=5, help="label-errors, active")
    parser.add_argument("--items", type=int, default=50_000, help="queue: items under review")
    parser.add_argument("--seed", type=int, default=0, help="live, queue")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.data is None and args.stage in ("label-errors", "active"):
        parser.error(f"--stage {args.stage}: needs --data, a folder with train|test/CLASS/…")
    return STAGES[args.stage](args)


if __name__ == "__main__":
    raise SystemExit(main())
