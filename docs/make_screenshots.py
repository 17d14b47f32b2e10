"""Draws the screenshots of the web pages, the report and MLflow, in light and dark: python docs/make_screenshots.py

The script paints a small data set, trains a classifier on it, starts `refract serve`, `refract review` and MLflow's server on free ports,
and takes docs/page.png, docs/review.png, docs/report.png and docs/mlflow.png with Chromium (Debian's package chromium). NAME-dark.png is
the dark form of NAME.png.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from make_preview import boat, fruit, house
from PIL import Image

from refract.pipeline.cli.demo import served
from refract.pipeline.config.config import config_from_dict
from refract.pipeline.files import write_atomically
from refract.pipeline.review.app import create_app
from refract.pipeline.review.server import ReviewServer, listen
from refract.pipeline.review.server import url as review_url
from refract.pipeline.review.start import ReviewOptions, start_review
from refract.pipeline.training.run import train

DOCS = Path(__file__).resolve().parent
NUM_IMAGES = 90
"""Images of each class."""
CONFIG = {
    "data": {"source": "scenes", "image_size": 32, "batch_size": 32},
    "augment": {"policy": [{"HorizontalFlip": {"p": 0.5}}, {"Rotate": {"degrees": 10, "p": 0.5}}]},
    "model": {"name": "lenet5"},
    "optim": {"name": "adamw", "lr": 0.002},
    "trainer": {"max_epochs": 25, "seed": 0},
    "evaluation": {"robustness": "none"},
    "tracking": {"experiment": "scenes", "model_name": "scenes"},
}
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
WIDE = {"width": 1400, "height": 880}
"""In a narrower window, MLflow shows the tags above the description and the metrics."""
LARGEST = 200_000
"""Upper bound of a file, in bytes."""


def paint_data_set(folder: Path) -> None:
    """Write `folder/CLASS/NUMBER.jpg`: random views of three painted scenes. Narrow views are hard to classify."""
    rng = np.random.default_rng(0)
    for paint in (house, boat, fruit):
        scene = paint().convert("RGB")
        (folder / paint.__name__).mkdir(parents=True)
        for number in range(NUM_IMAGES):
            view = scene.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=scene.getpixel((5, 5)))
            side = int(min(view.size) * rng.uniform(0.35, 1))
            left, top = (int(rng.integers(0, length - side + 1)) for length in view.size)
            pixels = np.asarray(view.crop((left, top, left + side, top + side)).resize((224, 224)), np.float32)
            pixels = pixels * rng.uniform(0.4, 1.1) + rng.normal(0, 25, pixels.shape)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / paint.__name__ / f"{number:02}.jpg", quality=85)


@contextmanager
def mlflow_server() -> Iterator[str]:
    """Serve ./mlflow.db on a free port, yield the URL, and stop the server at the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", f"--port={port}", "--workers=1"]
    command.append("--backend-store-uri=sqlite:///mlflow.db")
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    with Path("mlflow.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **QUIET})
    try:
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MLflow's server did not start:\n{Path('mlflow.log').read_text()}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def reviewed(run: Path) -> Iterator[str]:
    """Serve a review of the painted data set with some labels changed, by the model of the run; yield the URL."""
    shutil.copytree("scenes", "album")
    for number, (label, wrong) in enumerate((("house", "boat"), ("fruit", "house"), ("boat", "fruit"))):
        for image in sorted(Path("album", label).iterdir())[number : number + 3]:
            image.rename(Path("album", wrong, f"new-{image.name}"))
    session, _ = start_review(ReviewOptions(str(run), data="album"))
    ready = threading.Event()
    with listen("127.0.0.1", 0) as bound:
        server = ReviewServer(create_app(session, reviewer="ann"), on_ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        ready.wait()
        try:
            yield review_url(bound)
        finally:
            server.should_exit = True
            thread.join()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def run_page(model_name: str, version: str) -> str:
    """The path of the run that registered this version, in MLflow's pages."""
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    run = client.get_run(client.get_model_version(model_name, version).run_id)
    return f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"


def photograph_page(page: Any, url: str, images: list[Path]) -> None:
    """Open the web page, and send it images one after the other until a prediction has a heat map. Raises RuntimeError if none has."""
    page.goto(url)
    page.wait_for_selector("#card dd")
    for number, image in enumerate(images, 1):
        page.set_input_files("#file", image)
        page.wait_for_selector(f"#history li:nth-child({number})", state="attached")
        page.wait_for_timeout(500)
        if page.is_visible("#heat"):
            return
    raise RuntimeError("no prediction has a heat map; train on other images")


def photograph_review(page: Any, url: str) -> None:
    """Open the review at the likely label errors, and pass images until one has a heat map. Raises RuntimeError if none has."""
    page.goto(url)
    for _ in range(9):
        page.wait_for_function("() => document.querySelector('#thumbs figure:last-child img')?.naturalWidth > 0")
        page.wait_for_function(
            "() => !['', 'Computing …'].includes(document.getElementById('explanation-text').textContent)"
        )
        if page.is_visible("#small-heat"):
            page.evaluate("say('')")
            return
        page.keyboard.press("j")
    raise RuntimeError("no likely label error has a heat map; train on other images")


def photograph_mlflow(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_text("test_accuracy", exact=True).first.wait_for()
    assistant = page.get_by_role("button", name="Close", exact=True)  # of the panel that MLflow opens at a first visit
    assistant.click()
    assistant.wait_for(state="hidden")
    page.get_by_text("test images").wait_for()  # the description
    page.wait_for_timeout(2000)  # the last texts of MLflow's page arrive without a mark


def write(name: str, screenshot: bytes) -> None:
    """Write docs/NAME as a PNG with a palette. Raises RuntimeError if it is too large for the documentation."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(screenshot)).convert("RGB").quantize(192).save(buffer, "PNG", optimize=True)
    if len(buffer.getvalue()) > LARGEST:
        raise RuntimeError(f"{name} has {len(buffer.getvalue()):,} bytes; at most {LARGEST:,}: make the window smaller")
    write_atomically(DOCS / name, buffer.getvalue())
    print(f"wrote {DOCS / name}")


def take_screenshots(chromium: str) -> None:
    """Train, start both servers and write the files. Works in the current folder."""
    from playwright.sync_api import sync_playwright

    paint_data_set(Path("scenes"))
    result = train(config_from_dict(CONFIG), name="scenes")
    assert result is not None and result.version is not None, "MLflow refused the registration"
    for paint in (boat, fruit, house):
        paint().save(f"{paint.__name__}.jpg", quality=90)
    sent = [Path("house.jpg"), Path("fruit.jpg"), Path("boat.jpg"), *sorted(Path("scenes/house").iterdir())]
    report = (result.run_dir / "report.html").resolve().as_uri()
    with (
        served(f"models:/scenes/{result.version}") as server,
        reviewed(result.run_dir) as review,
        mlflow_server() as mlflow,
        sync_playwright() as play,
    ):
        mlflow += run_page("scenes", result.version)
        browser = play.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for scheme, suffix in (("light", ""), ("dark", "-dark")):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1000, "height": 622})
            page.set_default_timeout(60_000)
            photograph_page(page, server, sent)
            write(f"page{suffix}.png", page.screenshot())
            page.set_viewport_size({"width": 1100, "height": 700})
            photograph_review(page, review)
            write(f"review{suffix}.png", page.screenshot())
            page.set_viewport_size({"width": 1000, "height": 800})
            page.goto(report)
            write(f"report{suffix}.png", page.screenshot())
            page.set_viewport_size(WIDE)
            photograph_mlflow(page, mlflow)
            write(f"mlflow{suffix}.png", page.screenshot())
            page.close()
        browser.close()


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("make_screenshots.py needs Chromium. Install Debian's package: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="refract-screenshots-") as folder, chdir(folder):
        take_screenshots(chromium)


if __name__ == "__main__":
    main()
