"""Who is champion: MLflow's aliases `champion` and `previous`, moved so that at every instant a valid version is named.

`previous` is set first, then `champion`: a process that dies in between leaves the old champion where it was, and the move can be repeated.
MLflow has no exchange that only happens if nobody else made one, but refuses a second registered model of one name; a model named
`NAME.promoting` is the lock, for as long as the move takes.
"""

import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
STALE_S = 60.0
"""A move takes two requests: a lock so old was left by a process that died."""


class PromotionError(ValueError):
    """The alias cannot be moved; the message says why, and what to do."""


def aliases(client: Any, name: str) -> dict[str, str]:
    """alias → version, as text. PromotionError where there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise PromotionError(f"there is no registered model {name!r} at {client.tracking_uri}") from error
        raise


def promote(client: Any, name: str, version: str, *, instead_of: str | None, why: str = "") -> None:
    """Make the version champion. instead_of: the version that it was compared with, None where there was none; any other champion by now
    raises PromotionError. why: kept as a tag of the version. Once more for a version that is champion changes nothing."""
    with _alone(client, name):
        now = aliases(client, name)
        champion = now.get(CHAMPION)
        if champion == version:
            return
        if champion != instead_of:
            raise PromotionError(
                f"{name}: the champion is {_named(champion)} by now, and version {version} was compared with {_named(instead_of)}; "
                "compare it again"
            )
        _tag(client, name, version, {"promoted": _now(), **({"promotion.why": why} if why else {})})
        if champion is not None:
            client.set_registered_model_alias(name, PREVIOUS, champion)
        client.set_registered_model_alias(name, CHAMPION, version)


def rollback(client: Any, name: str) -> tuple[str, str]:
    """(the version that is champion again, that which was). PromotionError where none is known."""
    with _alone(client, name):
        now = aliases(client, name)
        champion, previous = now.get(CHAMPION), now.get(PREVIOUS)
        if previous is None or champion is None or previous == champion:
            raise PromotionError(f"{name}: no version is known to go back to; `previous` is {_named(previous)}")
        _tag(client, name, champion, {"rolled_back": _now()})
        client.set_registered_model_alias(name, CHAMPION, previous)
        client.set_registered_model_alias(name, PREVIOUS, champion)
        return previous, champion


@contextmanager
def _alone(client: Any, name: str) -> Iterator[None]:
    """Hold the lock. PromotionError where another process has it."""
    from mlflow.exceptions import MlflowException

    lock, own = f"{name}.promoting", f"{platform.node()} {os.getpid()} {uuid.uuid4().hex}"
    for attempt in (1, 2):
        try:
            client.create_registered_model(lock, tags={"holder": own, "since": str(time.time())})
            break
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        held = _holder(client, lock)
        if attempt == 2 or (held is not None and not _stale(*held)):
            raise PromotionError(f"{name}: another process moves its aliases at this moment; look what came of it")
        _remove(client, lock)
    try:
        yield
    finally:
        _remove(client, lock)


def _holder(client: Any, lock: str) -> tuple[str, float] | None:
    """(who, since when), or None where it is gone by now."""
    from mlflow.exceptions import MlflowException

    try:
        tags = client.get_registered_model(lock).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return tags.get("holder", ""), float(tags.get("since", 0))


def _stale(holder: str, since: float) -> bool:
    host, _, rest = holder.partition(" ")
    pid = rest.partition(" ")[0]
    if host == platform.node() and pid.isdigit() and int(pid) != os.getpid():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() - since > STALE_S


def _remove(client: Any, lock: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _tag(client: Any, name: str, version: str, tags: dict[str, str]) -> None:
    """PromotionError where there is no such version."""
    from mlflow.exceptions import MlflowException

    try:
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise PromotionError(f"{name} has no version {version}") from error
        raise


def _named(version: str | None) -> str:
    return "none" if version is None else f"version {version}"


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")
