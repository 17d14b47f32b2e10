"""The tool behind `make mutants` changes code, and leaves texts, type hints and the working tree as they are."""

import ast

import mutants
import pytest
from mutations import mutants_of

SOURCE = '''
"""A docstring."""
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from x import y

log = logging.getLogger(__name__)


def area(width: int | None, é: float = 2) -> float | None:
    """Return 1 + 1."""
    log.info("size %d", 3 + 4)
    if not (width and é) or width < 0:
        raise ValueError(f"width {width + 5} < 0")
    return width * é


class Box:
    def __repr__(self) -> str:
        return str(6 + 7)
'''


def test_mutants_change_expressions_and_statements() -> None:
    assert [mutant.change for mutant in mutants_of("f.py", SOURCE)] == [
        "2 → 3",
        "2 → 1",
        "not (width and é) or width < 0 → not (width and é) and width < 0",
        "not (width and é) → width and é",
        "width and é → width or é",
        "width < 0 → width <= 0",
        "0 → 1",
        "0 → -1",
        "raise ValueError(f'width {width + 5} < 0') → pass",
        "return width * é → return None",
        "width * é → width / é",
    ]


def test_a_mutant_changes_only_its_expression() -> None:
    changed = {mutant.change: mutant.apply(SOURCE) for mutant in mutants_of("f.py", SOURCE)}
    assert changed["not (width and é) → width and é"] == SOURCE.replace("not (width and é)", "(width and é)")
    assert all(ast.dump(ast.parse(source)) != ast.dump(ast.parse(SOURCE)) for source in changed.values())


@pytest.fixture(scope="module")
def test_files() -> mutants.TestFiles:
    return mutants.TestFiles()


def test_a_module_is_tested_by_files_with_its_name_and_by_files_that_import_it(test_files: mutants.TestFiles) -> None:
    files = test_files.of("pipeline/retraining/gate.py")
    assert files[0] == "tests/pipeline/test_pipeline_gate.py"
    assert sum(test_files.seconds.get(file, 0.0) for file in files) <= mutants.SECONDS
    more = test_files.of("pipeline/retraining/gate.py", mutants.SURVIVOR_SECONDS)
    assert set(files) < set(more), "a mutant that survives meets more files"
    assert "tests/models/test_models_bundle.py" in test_files.of("models/bundle/info.py")
    assert "tests/augment/test_augment_decode.py" in test_files.of("augment/decoding/formats.py")
    assert "tests/models/test_models_freezing.py" in test_files.of("models/training/sam.py")  # def test_sam_…
    assert test_files.of("serve/runtime/backends/openvino.py")  # imported by its name in a table


def test_a_larger_sample_extends_a_smaller_one() -> None:
    sample = mutants.draw(["refract"], 6, seed=1)
    assert sample[:3] == mutants.draw(["refract"], 3, seed=1) != mutants.draw(["refract"], 3, seed=2)
