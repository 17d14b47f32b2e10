"""The data of a night, as `take` writes them down: what is held out, what is known again, what counts as changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_data import COLORS, picture, write_picture

from pipeline.config import Config, config_from_dict
from pipeline.data.manifest import load_manifest
from pipeline.retraining.place import place_of
from pipeline.retraining.snapshot import Snapshot, changed, inputs_digest, take


def paint(root: Path, numbers: range, labels: Any = COLORS) -> None:
    for label in labels:
        for number in numbers:
            write_picture(root / label / f"{number:03}.png", picture(label, number, side=16))


def config_at(root: Path, source: str = "pictures", **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "data": {"source": str(root / source), "image_size": 16, "workers": 0},
        "model": {"name": "lenet5"},
        "tracking": {"model_name": "colors"},
        "retrain": {"folder": str(root / "retrain")},
    }
    return config_from_dict({name: values.get(name, {}) | sections.get(name, {}) for name in {**values, **sections}})


def taken(config: Config) -> Snapshot:
    return take(config, place_of(config))


def test_pictures_that_moved_are_found_where_they_are(tmp_path: Path) -> None:
    paint(tmp_path / "pictures", range(10))
    before = taken(config_at(tmp_path))
    shutil.move(tmp_path / "pictures", tmp_path / "photos")
    after = taken(config_at(tmp_path, "photos"))
    assert after == before, "the content is the same"
    assert changed(after) == []
    assert all(Path(sample.path).exists() for sample in load_manifest(after.manifest).samples)
    assert sorted(file.name for file in after.folder.iterdir()) == ["files.json", "manifest.csv", "snapshot.json"]


@pytest.mark.parametrize("key", ["augment.policy", "model.weights", "loss.teacher"])
def test_a_file_that_the_config_names_is_an_input(tmp_path: Path, key: str) -> None:
    paint(tmp_path / "pictures", range(10))
    section, name = key.split(".")
    file = tmp_path / "named.yaml"
    config = config_at(tmp_path, **{section: {name: str(file)}})
    snapshot = taken(config)

    def digest(content: str) -> str:
        file.write_text(content)
        return inputs_digest(config, snapshot, {}, "")

    first = digest("- HorizontalFlip: {p: 0.5}\n")
    assert digest("- HorizontalFlip: {p: 0.9}\n") != first
    assert digest("- HorizontalFlip: {p: 0.5}\n") == first
