"""Measure `refract score` on 10,000 small images against the bare engine, and check that three kills lose no row.

The bare engine is a plain loop over batches (read, preprocess, network, probabilities; nothing is stored) in one process per core. It and
`refract score` take turns. Each is timed from the moment its networks are loaded; the time of `refract score` includes its part files and
the final file. Other work on the machine disturbs these times, so one process also runs both in turns, one shard each, and counts its
processor time. Then the program kills a run three times (SIGKILL), and the run resumes each time. Exit code 1 if the median ratio of the
rounds is below 0.9, or if a row is missing, duplicated or different from that of the undisturbed run.

    python -m benchmarks.batch_scoring --json benchmarks/results/batch_scoring.json
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import environment, write

BATCH, GOAL = 64, 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--engine", choices=("processes", "ray"), default="processes")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = make_images(work / "images", args.images)
        make_bundle(work / "bundle", args.network)
        rates: dict[str, list[float]] = {"bare": [], "refract score": []}
        for _ in range(args.rounds):
            rates["bare"].append(bare(work / "bundle", files, cores))
            rates["refract score"].append(scored(work, args.engine))
            print({name: round(series[-1]) for name, series in rates.items()}, flush=True)
        processor = in_turns(work)
        kills = killed(work, args.kills, args.engine)
        result = {
            "images": args.images,
            "network": args.network,
            "engine": args.engine,
            "processes": cores,
            "load": round(os.getloadavg()[0], 1),
            "rows_a_second": {name: round(median(series), 1) for name, series in rates.items()},
            "all_rounds": {name: [round(rate, 1) for rate in series] for name, series in rates.items()},
            **kills,
        }
    ratios = [score_rate / bare for score_rate, bare in zip(rates["refract score"], rates["bare"], strict=True)]
    result["ratio"], result["ratio_of_processor_time"] = round(median(ratios), 3), processor
    result["holds"] = bool(
        result["ratio"] >= GOAL and kills["kills"] == args.kills and kills["every_row_once"] and kills["equal"]
    )
    print(json.dumps(result, indent=1))
    if args.json:
        write(args.json, {"environment": environment("torch", "pyarrow", "ray"), **result})
    return 0 if result["holds"] else 1


def make_images(root: Path, count: int) -> list[Path]:
    """Write JPEGs of 64×64 smooth pixels, 1,000 per folder."""
    import cv2
    import numpy as np

    draw, files = np.random.default_rng(0), []
    for number in range(count):
        file = root / f"{number // 1000:03}" / f"{number:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(file), cv2.resize(small, (64, 64), interpolation=cv2.INTER_CUBIC))
        files.append(file)
    return files


def make_bundle(path: Path, name: str) -> None:
    """Write a bundle with an untrained network, which is as fast as a trained one."""
    import torch

    from refract.augment import Preprocess
    from refract.models.bundle.bundle import BundleInfo, save_bundle
    from refract.models.classifier import Classifier
    from refract.models.registry import build

    torch.manual_seed(0)
    preprocess = Preprocess(height=32, width=32)
    info = BundleInfo(
        name="bench", task="multiclass", labels=tuple(f"class {i}" for i in range(10)), preprocess=preprocess.to_dict(),
        network={"name": name, "image_size": [32, 32], "args": {}}, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    network = build(name, 10, image_size=(32, 32))
    save_bundle(path, info, Classifier(network, mean=preprocess.mean, std=preprocess.std).eval(), ())


def bare(bundle: Path, files: list[Path], processes: int) -> float:
    """Return the images per second of plain loops that start together, until the last one ends."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes + 1)
    workers = [
        context.Process(target=loop, args=(bundle, files[place::processes], ready)) for place in range(processes)
    ]
    for process in workers:
        process.start()
    ready.wait()
    begun = time.perf_counter()
    for process in workers:
        process.join()
    return len(files) / (time.perf_counter() - begun)


def loop(bundle: Path, files: list[Path], ready: Any) -> None:
    import torch

    from refract.augment import Preprocess
    from refract.models.bundle.bundle import load_bundle

    torch.set_num_threads(1)
    opened = load_bundle(bundle)
    classifier, preprocess = opened.classifier(), Preprocess.from_dict(opened.info.preprocess)
    ready.wait()
    plain(classifier, preprocess, files)
    os._exit(0)  # Python's clean-up at exit does not count as time of the loop


def plain(classifier: Any, preprocess: Any, files: list[Path]) -> None:
    import numpy as np
    import torch

    from refract.models.classifier import probabilities

    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            pixels = np.stack([preprocess(file.read_bytes()) for file in files[start : start + BATCH]])
            logits = classifier(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            probabilities(logits, task="multiclass", temperature=1.0).numpy()


def in_turns(work: Path) -> float:
    """Return the processor time of the plain loop over that of a scorer with its part files, in one process; the median over shards."""
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.inference.batch.listing import listing_of
    from refract.pipeline.inference.batch.worker import Scorer
    from refract.pipeline.inference.batch_scoring import Options, job_of

    (work / "turns").mkdir()
    opened, listing = load_bundle(work / "bundle"), listing_of(work / "images")
    scorer = Scorer(job_of(opened, listing, Options(batch_size=BATCH), work / "turns", "key"))
    ratios = []
    for shard in listing.shards(512):
        files = [Path(row.path or "") for row in shard.rows]
        begun = time.process_time()
        plain(scorer.classifier, scorer.preprocess, files)
        between = time.process_time()
        list(scorer([shard]))
        ratios.append((between - begun) / (time.process_time() - between))
    return round(median(ratios), 3)


def command(work: Path, out: str, engine: str) -> list[str]:
    arguments = ["score", str(work / "bundle"), str(work / "images"), "-o", str(work / out)]
    return [sys.executable, "-m", "refract", *arguments, "--overwrite", "--batch-size", str(BATCH), "--engine", engine]


def scored(work: Path, engine: str) -> float:
    done = subprocess.run(command(work, "calm.parquet", engine), capture_output=True, text=True, check=False)
    match = re.search(r"([\d,]+) rows a second", done.stdout)
    if done.returncode or match is None:
        sys.exit(f"refract score ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return float(match[1].replace(",", ""))


def killed(work: Path, kills: int, engine: str) -> dict[str, Any]:
    """Kill a run several times, each time after a further fraction of its parts, resume it, and check the output."""
    import numpy as np
    import pandas as pd

    calm = pd.read_parquet(work / "calm.parquet")
    folder, at = work / ".killed.parquet.parts", []
    total = -(-len(calm) // 512)
    for kill in range(1, kills + 1):
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command(work, "killed.parquet", engine), stdout=quiet, stderr=quiet)
        while process.poll() is None and len(list(folder.glob("0*.parquet"))) < total * kill / (kills + 1):
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        at.append(len(list(folder.glob("0*.parquet"))))
    subprocess.run(command(work, "killed.parquet", engine), capture_output=True, check=True)
    table = pd.read_parquet(work / "killed.parquet")
    once = table["path"].is_unique and table["path"].tolist() == calm["path"].tolist() and table["error"].isna().all()
    apart = np.abs(np.stack(table["probabilities"].to_list()) - np.stack(calm["probabilities"].to_list())).max()
    return {
        "kills": len(at),
        "parts_at_kills": at,
        "parts": total,
        "rows": len(table),
        "every_row_once": bool(once),
        "farthest_probability": float(apart),
        "equal": bool(apart < 1e-5),
        "left_behind": sorted(path.name for path in work.glob(".*")),
    }


if __name__ == "__main__":
    sys.exit(main())
