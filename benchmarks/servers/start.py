"""A bundle with random weights, and a server process for it, for the benchmarks of serving."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def make_bundle(network: str, encoded: Sequence[bytes], path: Path, *, size: int = 224, seed: int = 0) -> Path:
    """Write a bundle with random weights. Its batch norms are fitted to the images, so that activations keep an ordinary size.

    The golden samples are the eight images with the most confident predictions.
    """
    import numpy as np
    import torch

    from refract.augment.preprocess import Preprocess
    from refract.models.bundle.bundle import BundleInfo, GoldenSample, save_bundle
    from refract.models.classifier import Classifier, probabilities
    from refract.models.registry import build

    torch.manual_seed(seed)
    preprocess, count = Preprocess(size, size), 100 if size > 64 else 10
    network_of = build(network, count, image_size=(size, size))
    classifier = Classifier(network_of, mean=preprocess.mean, std=preprocess.std).eval()
    images = torch.from_numpy(np.stack([preprocess(data) for data in encoded])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        for _ in range(20):
            classifier.network.train()(classifier.normalise(images))
    classifier.eval()
    # A fresh network of few layers is unsure of everything; this spreads its answers, so that a wrong one shows.
    temperature = 1.0 if size > 64 else 0.05
    with torch.inference_mode():
        answers = probabilities(classifier(images), task="multiclass", temperature=temperature)
    leads = answers.topk(2).values.diff(dim=1)[:, 0]
    surest = leads.argsort()[:8].tolist()  # the differences are negative
    golden_samples = [GoldenSample(f"{i:02}.img", encoded[i], tuple(answers[i].tolist())) for i in surest]
    info = BundleInfo(
        name=network, task="multiclass", labels=tuple(f"class {i}" for i in range(count)), created="2026-01-01T00:00:00+00:00",
        network={"name": network, "image_size": [size, size], "args": {}}, preprocess=preprocess.to_dict(), temperature=temperature,
    )  # fmt: skip
    return save_bundle(path, info, classifier, golden_samples)


@contextmanager
def serving(
    command: list[str], bundle: Path, health: str = "/readyz", **more: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(the address, the process) of a server that answers. PORT and BUNDLE in the command are filled in; REFRACT_BENCH_BUNDLE names the
    bundle too. more: of the environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [part.replace("PORT", str(port)).replace("BUNDLE", str(bundle)) for part in command]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow looks for uvicorn there
    environ = {**os.environ, "PATH": path, "REFRACT_BENCH_BUNDLE": str(bundle), **more}
    environ["HOME"] = str(bundle.parent)  # a choice of backend that was kept elsewhere was made at another time
    null = subprocess.DEVNULL
    with subprocess.Popen(arguments, env=environ, start_new_session=True, stdout=null, stderr=null) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(900):
                try:
                    urllib.request.urlopen(url + health, timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise RuntimeError(f"{arguments} ended with exit code {process.returncode}") from None
                    time.sleep(0.2)
            else:
                raise TimeoutError(f"{arguments} does not answer")
            yield url, process
        finally:
            process.terminate()
            process.wait(60)
            with suppress(ProcessLookupError):  # LitServe leaves its workers behind, which keep polling
                os.killpg(process.pid, signal.SIGKILL)


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
