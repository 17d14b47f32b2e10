"""`make release` refuses a version that the changelog does not have."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))

from release import ReleaseError, checked_version


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    return tmp_path


@pytest.mark.parametrize(
    ("changelog", "message"),
    [
        ("# Changelog\n\n## 1.1.0\n\n- x\n", r"no section `## 1\.2\.0`.*newest is 1\.1\.0"),
        ("# Changelog\n", "newest is missing"),
        ("# Changelog\n\n## Unreleased\n\n## 1.2.0\n", r"Unreleased`. Name it `## 1\.2\.0`"),
    ],
)
def test_a_version_without_its_changelog_is_refused(repository: Path, changelog: str, message: str) -> None:
    (repository / "CHANGELOG.md").write_text(changelog)
    with pytest.raises(ReleaseError, match=message):
        checked_version(repository)


def test_the_version_of_the_changelog_is_released(repository: Path) -> None:
    (repository / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (2027-01-31)\n\n- x\n\n## 1.1.0\n")
    assert checked_version(repository) == "1.2.0"
