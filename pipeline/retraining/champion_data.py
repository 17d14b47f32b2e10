"""The samples that a champion of `refract train` was trained and tested on, as its run's `splits.csv` in MLflow lists them."""

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from refract.models.multimodal.tokens import trimmed
from refract.pipeline.config.config import Config
from refract.pipeline.config.sections import DataConfig
from refract.pipeline.data.manifest import DataError, Sample, load_manifest
from refract.pipeline.data.storage import scheme_of
from refract.pipeline.retraining.exact_duplicates import contents
from refract.pipeline.retraining.holdout import TABLE
from refract.pipeline.retraining.workspace import Workspace
from refract.pipeline.tracking.address import absolute, sqlite_path, tracking_uri
from refract.pipeline.tracking.model_registry import registry_of
from refract.progress import tracked

if TYPE_CHECKING:
    from mlflow import MlflowClient

SPLITS = "splits.csv"


@dataclass(frozen=True)
class ChampionData:
    """Samples by content, as `Scan.groups`.

    trained: training and validation samples; tested: test samples; missing: number of training files that cannot be read any more, so
    that their content is unknown.
    """

    trained: frozenset[str]
    tested: frozenset[str]
    missing: int

    def trained_on(self, samples: Iterable[Sample]) -> frozenset[str] | None:
        """Return the keys of the samples that the champion was trained on; None if missing files could be among them. OSError."""
        known = {sample.key: contents(sample) for sample in samples}
        overlap = frozenset(key for key, digests in known.items() if self.trained & digests)
        if not overlap and self.missing and not all(self.tested & digests for digests in known.values()):
            return None
        return overlap


def champion_data(config: Config, client: "MlflowClient", version: str) -> ChampionData | None:
    """Read the sample list of a registered version's run; None if MLflow has no such list."""
    rows = _listed(client, str(config.tracking.model_name), version)
    return None if rows is None else _known(rows, _digests(rows, config.data, config.reads))


def champion_splits(config: Config, client: "MlflowClient", version: str) -> dict[str, str] | None:
    """Return content → split of a registered version's training and validation samples; None if MLflow has no list of them."""
    rows = _listed(client, str(config.tracking.model_name), version)
    if rows is None:
        return None
    digests = _digests(rows, config.data, config.reads)
    known = [(digest, row.split) for digest, row in zip(digests, rows, strict=True) if digest and row.split != "test"]
    return dict(sorted(known, key=lambda entry: entry[1], reverse=True))  # `train` comes last, and replaces `val`


def _listed(client: "MlflowClient", name: str, version: str) -> "list[_Row] | None":
    """Read the sample list of a version's run; None if MLflow has no such list."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_model_version(name, version).run_id
        if not run or SPLITS not in {artifact.path for artifact in client.list_artifacts(run)}:
            return None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return _rows(client, run)


def data_of_first_champion(config: Config, workspace: Workspace) -> ChampionData | None:
    """Return the data that the first holdout must respect: those of a champion of `refract train`.

    None if a holdout is frozen or named, and for champions of a retraining run.
    """
    from refract.pipeline.tracking.aliases import CHAMPION

    database = sqlite_path(absolute(tracking_uri(config.tracking)))
    if config.gate.holdout is not None or (workspace.holdout / TABLE).exists() or (database and not database.exists()):
        return None
    client, name, aliases = registry_of(config.tracking)
    champion = aliases.get(CHAMPION)
    if champion is None or "snapshot" in client.get_model_version(name, champion).tags:
        return None
    return champion_data(config, client, champion)


class _Row(NamedTuple):
    path: str
    text: str
    split: str


def _rows(client: "MlflowClient", run: str) -> list[_Row]:
    import pandas as pd
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        path = download_artifacts(run_id=run, artifact_path=SPLITS, dst_path=folder, tracking_uri=client.tracking_uri)
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return [_Row(*row) for row in zip(table["path"], table["text"], table["split"], strict=True)]


def _digests(rows: Sequence[_Row], data: DataConfig, reads: frozenset[str]) -> list[str | None]:
    """Return each row's content, None if its file cannot be read."""
    embedded, images = _embedded(rows, data), "images" in reads
    samples = [embedded.get(row.path) or Sample(row.path, (), text=row.text, has_image=bool(row.path)) for row in rows]
    with ThreadPoolExecutor() as pool:
        results = pool.map(partial(_digest, images=images), samples)
        return list(tracked(results, "reading the champion's data", len(samples)))


def _known(rows: Sequence[_Row], digests: Sequence[str | None]) -> ChampionData:
    of_split: dict[bool, set[str | None]] = {True: set(), False: set()}
    for row, digest in zip(rows, digests, strict=True):
        of_split[row.split == "test"].add(digest)
    trained, tested = (frozenset(filter(None, of_split[test])) for test in (False, True))
    missing = sum(digest is None and row.split != "test" for row, digest in zip(rows, digests, strict=True))
    return ChampionData(trained, tested - trained, missing)


def _embedded(rows: Sequence[_Row], data: DataConfig) -> Mapping[str, Sample]:
    """Return name → sample for data without files, such as the digits: `splits.csv` lists their names, and absolute paths of files."""
    if all(not row.path or Path(row.path).is_absolute() or scheme_of(row.path) for row in rows):
        return {}
    try:
        manifest = load_manifest(data.source, data.task, to_train=False)
    except DataError:
        return {}
    return {sample.path: sample for sample in manifest.samples if sample.has_image and sample.data is not None}


def _digest(sample: Sample, *, images: bool) -> str | None:
    """Return the sample's `Scan.groups`; None if its file cannot be read. images: whether the network reads images."""
    try:
        data = sample.read() if images and sample.has_image else trimmed(sample.text).encode("utf-8", "replace")
    except OSError:
        return None
    return hashlib.sha256(data).hexdigest()
