"""`refract demo`: the whole workflow on the embedded digits, from training to predictions over HTTP."""

import argparse
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refract import output
from refract.pipeline import console
from refract.pipeline.cli.promote import by_hand
from refract.pipeline.cli.train import mlflow_hint

NUM_REQUESTS = 10
"""Test images that the demo sends to the server."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract demo",
        description="Train on scikit-learn's handwritten digits, track and register in MLflow, serve, and request predictions. "
        "The demo writes runs/ and mlflow.db (with mlruns/) into the current folder. Each demo registers and serves a new version.",
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
    # By version number: the champion may be the version of an earlier demo.
    uri = f"models:/{config.tracking.model_name}/{result.version}" if result.version else str(result.bundle)
    print(f"   test accuracy {accuracy:.2%}; bundle {result.bundle}; registered as {uri}, alias {result.alias}")
    print("2. Serve it")
    with served(uri) as url:
        print(f"   {url}")
        print(f"3. Classify {NUM_REQUESTS} test images, sent as PNG over HTTP")
        num_correct = _classify(url, result.run_dir / "splits.csv", load_bundle(result.bundle).info.labels)
    print(f"   {num_correct} of {NUM_REQUESTS} correct\n")
    output.result(
        {"run": result.run_dir, "accuracy": accuracy, "model": uri, "requests": NUM_REQUESTS, "correct": num_correct}
    )
    prefix = console.bin_prefix()
    print("Next:")
    print(f"   see the run          {mlflow_hint(config.tracking)}")
    print(f"   serve it             {prefix}refract serve {uri}")
    if result.version and result.alias != "champion":
        command = by_hand(str(config.tracking.model_name), str(result.version), config.tracking.uri)
        print(f"   make it champion     {prefix}{command}   (now: version {result.champion})")
    print(f"   use your images      {prefix}refract init FOLDER -o mine.yaml && {prefix}refract train mine.yaml")
    return 0


def example(name: str) -> Path:
    """Return the path of an example config: at the top of a checkout, or inside `refract/pipeline` of an installation."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(2, "the example config is missing from this installation", name)


@contextmanager
def served(source: str) -> Iterator[str]:
    """Run `refract serve` on a free port, yield its URL, and stop it at the end of the block."""
    command = [sys.executable, "-m", "refract", "serve", source, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline().strip() if process.stdout else ""
            if " on http://" not in ready:
                raise RuntimeError(f"the server did not start (exit code {process.wait()})")
            yield ready.rpartition(" on ")[2]
        finally:
            process.send_signal(signal.SIGTERM)


def _classify(url: str, splits: Path, labels: tuple[str, ...]) -> int:
    """Send test images to the server, print the predictions, and return the number of correct ones."""
    import pandas as pd

    from refract.pipeline.data.manifest import load_manifest

    test_paths = set(pd.read_csv(splits, dtype=str).query("split == 'test'")["path"])
    samples = [sample for sample in load_manifest("digits").samples if sample.path in test_paths]
    print("   image          truth  predicted  confidence")
    num_correct = 0
    for sample in samples[:: len(samples) // NUM_REQUESTS][:NUM_REQUESTS]:
        request = urllib.request.Request(f"{url}/v1/predict?top=1", sample.read(), {"Content-Type": "image/png"})
        with urllib.request.urlopen(request, timeout=30) as response:
            prediction = json.load(response)["predictions"][0]
        truth = labels[sample.labels[0]]
        num_correct += prediction["label"] == truth
        print(f"   {sample.path:<15}  {truth:>5}  {prediction['label']:>9}  {prediction['confidence']:>10.1%}")
    return num_correct
