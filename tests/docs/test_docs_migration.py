"""The names in docs/migration.md exist: those of Refract, and those of the libraries that are installed."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text("utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in table[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_ops_and_transforms_exist() -> None:
    albumentations = pytest.importorskip("albumentations")
    from torchvision.transforms import v2

    from refract.augment.registry import OPS

    table = [line.split("|")[1:4] for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 4]
    theirs_albumentations, theirs_torchvision, ours = (
        [name for row in table[1:] for name in names(row[i])] for i in range(3)
    )
    assert len(ours) > 40
    assert [name for name in theirs_albumentations if not hasattr(albumentations, name)] == []
    assert [name for name in theirs_torchvision if not hasattr(v2, name)] == []
    assert [name for name in ours if name not in OPS] == []


def test_augmenters_of_imgaug_and_their_ops_exist() -> None:
    if importlib.util.find_spec("imgaug") is None:
        pytest.skip("imgaug is optional: the extra `external` installs it, and this compares the page with its names")
    from refract.augment.ops.external import _imgaug
    from refract.augment.registry import OPS

    _imgaug()  # replaces the names that NumPy 2 removed
    import imgaug.augmenters as iaa

    table = rows("imgaug")
    theirs, ours = ([name for row in table for name in re.findall(r"`(\w+)", row[i])] for i in range(2))
    assert len(ours) > 30
    assert [name for name in theirs if not hasattr(iaa, name)] == []
    assert [name for name in ours if name not in OPS] == []


def test_config_keys_exist() -> None:
    from refract.pipeline.config.schema import json_schema

    schema = json_schema()
    keys = {
        f"{section}.{key}"
        for section, link in schema["properties"].items()
        if "$ref" in link
        for key in schema["$defs"][link["$ref"].rpartition("/")[2]]["properties"]
    }
    used = {key for row in rows("timm's `train.py`") for key in re.findall(r"`([a-z]+\.[a-z_]+)[:`]", row[1])}
    assert len(used) > 25
    assert used <= keys


def test_options_of_the_server_and_of_litserve_exist() -> None:
    litserve = pytest.importorskip("litserve")
    from refract.serve.cli.options import _parser

    options = {option for action in _parser()._actions for option in action.option_strings}
    used = {
        o for title in ("LitServe", "TorchServe") for row in rows(title) for o in re.findall(r"`(--[a-z-]+)", row[1])
    }
    assert len(used) > 8
    assert used <= options
    known = {
        *inspect.signature(litserve.LitServer).parameters,
        *inspect.signature(litserve.LitAPI).parameters,
        *dir(litserve.LitAPI),
    }
    theirs = {name for row in rows("LitServe") for name in names(row[0]) if name.islower()}
    assert theirs <= known
