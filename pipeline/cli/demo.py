"""`refract demo`: the main job on the embedded digits, from training to answers over HTTP."""

import argparse
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refract.pipeline.cli import console
from refract.pipeline.cli.promote import by_hand
from refract.pipeline.cli.train import seen_at

SHOWN = 10


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract demo",
        description="Train on scikit-learn's handwritten digits, track and register in MLflow, serve, and ask the server. "
        "Writes runs/ and mlflow.db (with mlruns/) into the current folder. A repeated demo registers and serves its own version.",
    )
    parser.parse_args(argv)
    return console.run("demo", _demo)


def _demo() -> int:
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.config.config import load_config
    from refract.pipeline.training.run import train

    config = load_config(example("digits.yaml"))
    print("1. Train on scikit-learn's handwritten digits, with augmentation, tracked in MLflow")
    result = train(config, name="digits")
    assert result is not None, "the demo trains in one process"
    accuracy = result.metrics["accuracy"]
    # Its own version: a server of the champion would answer with an earlier demo's.
    uri = f"models:/{config.tracking.model_name}/{result.version}" if result.version else str(result.bundle)
    print(f"   hold-out accuracy {accuracy:.2%}; bundle {result.bundle}; registered as {uri}, alias {result.alias}")
    print("2. Serve it")
    with served(uri) as url:
        print(f"   {url}")
        print(f"3. Ask for {SHOWN} images that it never saw, as PNG over HTTP")
        right = _ask(url, result.run_dir / "splits.csv", load_bundle(result.bundle).info.labels)
    print(f"   {right} of {SHOWN} right\n")
    here = console.bin_prefix()
    print("Next:")
    print(f"   see the run          {seen_at(config)}")
    print(f"   serve it             {here}refract serve {uri}")
    if result.version and result.alias != "champion":
        command = by_hand(str(config.tracking.model_name), str(result.version), config.tracking.uri)
        print(f"   make it champion     {here}{command}   (version {result.champion} is)")
    print(f"   your own images    {here}refract init FOLDER -o mine.yaml && {here}refract train mine.yaml")
    return 0


def example(name: str) -> Path:
    """A config that comes with Refract: at the top of a checkout, inside `refract/pipeline` where it was installed."""
    here = Path(__file__).parents[1]
    for folder in (here / "configs", here.parents[1] / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(2, "the example config is missing from this installation", name)


@contextmanager
def served(source: str) -> Iterator[str]:
    """The address of a `refract serve` on a free port; it is stopped at the end."""
    command = [sys.executable, "-m", "refract", "serve", source, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline().strip() if process.stdout else ""
            if " on http://" not in ready:
                raise RuntimeError(f"the server did not start (exit code {process.wait()})")
            yield ready.rpartition(" on ")[2]
        finally:
            process.send_signal(signal.SIGTERM)


def _ask(url: str, splits: Path, labels: tuple[str, ...]) -> int:
    """Send held-out images, print the answers, return how many are right."""
    import pandas as pd

    from refract.pipeline.data.manifest import load_manifest

    held_out = set(pd.read_csv(splits, dtype=str).query("split == 'test'")["path"])
    samples = [sample for sample in load_manifest("digits").samples if sample.path in held_out]
    print("   image          truth  answer  confidence")
    right = 0
    for sample in samples[:: len(samples) // SHOWN][:SHOWN]:
        request = urllib.request.Request(f"{url}/v1/predict?top=1", sample.read(), {"Content-Type": "image/png"})
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)["predictions"][0]
        truth = labels[sample.labels[0]]
        right += answer["label"] == truth
        print(f"   {sample.path:<15}  {truth:>5}  {answer['label']:>6}  {answer['confidence']:>10.1%}")
    return right
