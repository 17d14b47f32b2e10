"""Measure the memory after 2,000 and after 20,000 augmented photos, and the time of `import refract.augment`.

python -m benchmarks.augment_memory --images DIR --json benchmarks/results/augment_memory.json
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.report import environment, write
from refract.augment import Augmenter

MARKS = (2_000, 20_000)


def resident() -> float:
    """Megabytes of this process in memory (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def import_seconds(statement: str, repeats: int = 7) -> float:
    """Return the median over fresh interpreters, minus the time of an empty one."""

    def once(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return median(once(statement) for _ in range(repeats)) - median(once("pass") for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    files = [path.read_bytes() for path in sorted(args.images.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    augmenter = Augmenter("imagenet", seed=0)
    megabytes = {}
    for number in range(1, MARKS[-1] + 1):
        augmenter(files[number % len(files)], epoch=number // len(files), index=number)
        if number in MARKS:
            megabytes[number] = round(resident(), 1)
            print(f"after {number:6,} photos: {megabytes[number]:.1f} MB resident")
    seconds = round(import_seconds("import refract.augment"), 3)
    print(f"import refract.augment: {seconds:.3f} s")
    write(
        args.json, {"environment": environment("refract"), "resident_megabytes": megabytes, "import_seconds": seconds}
    )


if __name__ == "__main__":
    main()
