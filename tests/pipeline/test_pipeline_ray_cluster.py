"""Batch scoring on a Ray cluster of two nodes on this machine."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from subprocess import run

import numpy as np
import pandas as pd
import pytest
from small_data import paint

from refract.pipeline.inference.batch.ray_workers import cores_of_actor

ROOT = Path(__file__).parents[2]


def test_no_actor_spans_two_nodes() -> None:
    assert cores_of_actor([16], 4) == 4
    assert cores_of_actor([2, 2], 1) == 2, "an actor of four cores would wait for ever"
    assert cores_of_actor([3, 3], 3) == 1
    assert cores_of_actor([8, 4], 3) == 4
    assert cores_of_actor([1, 1], 5) == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")
def test_two_nodes_score_the_rows_of_one_process(tmp_path: Path) -> None:
    """Each node has one core, so that each of the two actors runs on another node."""
    import torch
    from ray.cluster_utils import Cluster

    from refract.models.bundle.bundle import BundleInfo, GoldenSample, save_bundle
    from refract.models.classifier import Classifier
    from refract.models.registry import build

    paint(tmp_path / "images", range(20))
    torch.manual_seed(0)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    classifier = Classifier(build("lenet5", 3, image_size=(32, 32)), mean=mean, std=std).eval()
    info = BundleInfo(
        name="colors",
        task="multiclass",
        labels=("a", "b", "c"),
        created="2026-01-01T00:00:00+00:00",
        network={"name": "lenet5", "image_size": [32, 32], "args": {}},
        preprocess={"height": 32, "width": 32, "resize": "squash", "mean": list(mean), "std": list(std)},
    )
    save_bundle(tmp_path / "bundle", info, classifier, [GoldenSample("00.png", b"x", (0.2, 0.3, 0.5), "a", True)])
    command = [sys.executable, "-m", "refract", "score", "bundle", "images", "--shard-size", "10", "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        environment["RAY_ADDRESS"] = cluster.address
        done = run(
            [*command, "-o", "two.parquet", "--engine", "ray"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    finally:
        cluster.shutdown()
    run([*command, "-o", "one.parquet"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    two, one = (pd.read_parquet(tmp_path / name) for name in ("two.parquet", "one.parquet"))
    assert len(two) == 60 and list(two.columns) == list(one.columns)
    pd.testing.assert_frame_equal(two, one, atol=1e-5, rtol=1e-5)
    assert np.isfinite(two.select_dtypes("number").to_numpy(np.float64)).any()
