"""Compare the batch executor with kornia on a GPU: the ops of `augment_batch`, each sample with its own draw, and the use of the bandwidth.

Refract reads and returns uint8, kornia float32 in 0…1, which are their own formats. The bandwidth ratio divides the bytes that a run must
at least read and write (the uint8 batch in and out) by the bytes that the device copies in the same time. `--device cpu` tests the program
without a GPU.

    python -m benchmarks.augment_gpu --json benchmarks/results/augment_gpu.json
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.augment_batch import SIDE, kornia, random_images, refract
from benchmarks.report import environment, summary, write


def seconds(call: Callable[[], torch.Tensor], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    rows = {}
    for count in args.batches:
        images = random_images(count).to(args.device)
        calls = {"refract": refract(images), "kornia": kornia(images), "copy": images.clone}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(args.rounds + 3):
            for name, call in calls.items():
                elapsed = 1000 * seconds(call, args.device)
                if number >= 3:  # the first ones warm up
                    times[name].append(elapsed)
        row: dict[str, object] = {name: summary(values) for name, values in times.items()}
        ours, theirs, copy = (summary(times[name])["median"] for name in calls)
        row["over_kornia"], row["share_of_copy_bandwidth"] = round(theirs / ours, 2), round(copy / ours, 4)
        rows[str(count)] = row
        print(
            f"{count} × {SIDE}²: Refract {ours:.2f} ms, kornia {theirs:.2f} ms ({theirs / ours:.1f} ×); {copy / ours:.1%} of a copy"
        )
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    write(args.json, {"device": device, "milliseconds": rows, "environment": environment("refract", "kornia", "torch")})


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
