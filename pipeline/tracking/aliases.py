"""Moves of MLflow's aliases `champion` and `previous`, such that they name a valid version at every instant.

`previous` is set first, then `champion`: a process that dies in between leaves the old champion, and the move can be repeated.
MLflow has no compare-and-swap, but rejects a second registered model of one name. So a model `NAME.promoting` is the lock of a move.
A lock is deleted by its name alone, even that of another process; so the holder is checked again before the champion is set, and
the champion is checked after.
"""

import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from refract.errors import InputError
from refract.models.credentials import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
LAST = "promoted"
"""The registered model's tag with its last promoted version: a version's own tags are deleted with the version."""

FIRST = "refract.first"
"""The version's tag with the alias that its training requests if the version is the model's first."""

WHY = 4000
"""The longest reason in characters: MLflow's servers accept 5,000 to 100,000, depending on their version."""

STALE_S = 60.0
"""The age in seconds, by the waiting process's clock, from which a lock counts as left by a dead process. A move takes a few requests."""

PATIENCE_S = 2 * STALE_S
"""The longest wait in seconds for a succession of other processes; longer than the wait for a dead one."""

SETTLE_S = 1.0
"""The wait in seconds after the removal of a stale lock. Other processes that also found it stale may remove the new lock until then."""

POLL_S = 0.5


class PromotionError(InputError):
    """The alias cannot be moved. The message says why, and what to do."""


class Busy(PromotionError):
    """Other processes moved the aliases for longer than PATIENCE_S."""


class RolledBack(PromotionError):
    """The version was champion, and a user rolled it back."""


def aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    """Return alias → version, as text. PromotionError if the model is not registered."""
    return {alias: str(version) for alias, version in _model(client, name).aliases.items()}


def promote(
    client: "MlflowClient", name: str, version: str, *, instead_of: str | None, why: str = "", by_hand: bool = False
) -> None:
    """Make the version champion. For the present champion only the reason changes.

    instead_of: the champion that the version was compared with, None without one. PromotionError if the champion is another one.
    why: the reason, stored as a tag of the version. by_hand: a user requests it, which overrides an earlier rollback.
    Waits for other processes that move the aliases; Busy after PATIENCE_S.
    """
    version, reason = numbered(version), _reason(why)
    with _alone(client, name) as held:
        champion = aliases(client, name).get(CHAMPION)
        if champion == version:
            _tag(client, name, version, reason)
            return
        if champion != instead_of:
            raise PromotionError(
                f"{name}: the champion is now {_named(champion)}, but version {version} was compared with {_named(instead_of)}; "
                "compare it again"
            )
        if not by_hand:
            _check_user_decisions(client, name, version, champion)
        _tag(client, name, version, {"promoted": _now()} | reason)
        if champion is not None:
            client.set_registered_model_alias(name, PREVIOUS, champion)
        _move(client, name, champion, version, held)
        client.set_registered_model_tag(name, LAST, version)


def name_version(client: "MlflowClient", name: str, version: str, *, first: str) -> dict[str, str]:
    """Give a version that a training registered its alias. Repeating the call changes nothing.

    first: the alias of the model's first version. With `champion`, the first version becomes champion unless a champion is or was named.
    That holds also if the first version is another one, whose process died before it set the alias. Every other version becomes
    `challenger`, unless a newer version that is not champion has that alias. Returns `alias`, the version's present alias, and
    `champion`, the champion's version, as far as they exist. Busy as `promote`.
    """
    lost = False
    if first == CHAMPION and (unnamed := _first_without_alias(client, name, version)) is not None:
        try:
            promote(client, name, unnamed, instead_of=None, why="the model's first version")
        except Busy:
            raise
        except PromotionError as error:
            log.info("%s", error)
            lost = unnamed == version
    now = aliases(client, name)
    champion, challenger = now.get(CHAMPION), now.get(CHALLENGER)
    promoted = not lost and "promoted" in version_tags(client, name, version)
    replaceable = challenger in (None, champion) or int(str(challenger)) < int(version)
    if version != champion and not promoted and replaceable:
        _set_challenger(client, name, version)
        challenger = version
    alias = CHAMPION if champion == version else CHALLENGER if challenger == version else None
    return {key: value for key, value in (("alias", alias), ("champion", champion)) if value is not None}


def _first_without_alias(client: "MlflowClient", name: str, version: str) -> str | None:
    """Return the model's first version if it must become champion: it is `version`, or its process died before it set the alias."""
    model = _model(client, name)
    if CHAMPION in model.aliases:
        return None
    lowest = _lowest(client, name)
    if lowest == version:
        return lowest
    wanted = version_tags(client, name, lowest).get(FIRST)
    if wanted is None and not {CHALLENGER, PREVIOUS} & model.aliases.keys() and LAST not in model.tags:
        wanted = CHAMPION  # versions of earlier releases have no FIRST tag
    return lowest if wanted == CHAMPION else None


def _set_challenger(client: "MlflowClient", name: str, version: str) -> None:
    """Set the alias. If two processes set a new alias at once, the database rejects one of them, and its retry replaces the alias."""
    from mlflow.exceptions import MlflowException

    for attempt in range(5):
        try:
            client.set_registered_model_alias(name, CHALLENGER, version)
            return
        except MlflowException:
            if attempt == 4:
                raise


def _lowest(client: "MlflowClient", name: str) -> str:
    """Return the lowest version number of the model."""
    return str(min(int(version.version) for version in client.search_model_versions(of_model(name))))


def of_model(name: str) -> str:
    """Return MLflow's filter for the versions of a model. The filter accepts either quote, and has no escape."""
    quote = '"' if "'" in name else "'"
    return f"name = {quote}{name}{quote}"


def way_back(client: "MlflowClient", name: str) -> tuple[str, str]:
    """Return (the champion, the version that `rollback` restores). PromotionError if there is none."""
    now = aliases(client, name)
    champion, previous = now.get(CHAMPION), now.get(PREVIOUS)
    if previous is None or champion is None or previous == champion:
        raise PromotionError(f"{name}: no version to roll back to; the alias `previous` is {_named(previous)}")
    return champion, previous


def rollback(client: "MlflowClient", name: str, *, expected: tuple[str, str] | None = None) -> tuple[str, str]:
    """Swap champion and previous version. Returns (the restored champion, the replaced one).

    expected: the result of `way_back`; PromotionError if the aliases have changed since.
    """
    with _alone(client, name) as held:
        champion, previous = way_back(client, name)
        if expected not in (None, (champion, previous)):
            raise PromotionError(
                f"{name}: another process moved the aliases: the champion is now {_named(champion)}, the previous one "
                f"{_named(previous)}; check them, and roll back again"
            )
        _tag(client, name, champion, {"rolled_back": _now()})
        _move(client, name, champion, previous, held)
        client.set_registered_model_alias(name, PREVIOUS, champion)
        return previous, champion


def _check_user_decisions(client: "MlflowClient", name: str, version: str, champion: str | None) -> None:
    """Raise RolledBack for a version that a user rolled back, and PromotionError if the last champion's alias was deleted."""
    by_hand = f"`refract promote {name} {version}`"
    if since := version_tags(client, name, version).get("rolled_back"):
        raise RolledBack(f"{name}: version {version} was rolled back at {since}; promote it again with {by_hand}")
    model = _model(client, name)
    last = model.tags.get(LAST) or model.aliases.get(PREVIOUS)
    if champion is None and last is not None:
        raise PromotionError(
            f"{name}: version {last} was promoted before, but no version is champion now; its alias may have been deleted. "
            f"Promote one by hand, for example with {by_hand}"
        )


def _move(client: "MlflowClient", name: str, champion: str | None, version: str, held: Callable[[], bool]) -> None:
    """Set the champion. PromotionError if another process has set it meanwhile."""
    still_held = held()
    now = aliases(client, name).get(CHAMPION)
    if still_held and now == champion:
        client.set_registered_model_alias(name, CHAMPION, version)
        now = aliases(client, name).get(CHAMPION)
        if now == version:
            return
    raise PromotionError(
        f"{name}: another process moved the aliases at the same time; the champion is now {_named(now)}; "
        f"compare version {version} with it again"
    )


def _model(client: "MlflowClient", name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise PromotionError(
                f"no registered model {name!r} at {masked(client.tracking_uri)}; check its name, or set --uri"
            ) from error
        raise


@contextmanager
def _alone(client: "MlflowClient", name: str) -> Iterator[Callable[[], bool]]:
    """Hold the lock; yields a function that checks whether this process still holds it. Busy as `promote`."""
    lock, holder = f"{name}.promoting", f"{platform.node()} {os.getpid()} {uuid.uuid4().hex}"

    def held() -> bool:
        return _holder(client, lock) == holder

    _take(client, lock, holder)
    try:
        yield held
    finally:
        if held():
            _remove(client, lock)


def _take(client: "MlflowClient", lock: str, own_holder: str) -> None:
    """Create the lock, once it is free or was left by a dead process."""
    start = since = time.monotonic()
    seen, removed = None, False
    while not _create(client, lock, own_holder):
        holder = _holder(client, lock)
        if holder == own_holder:  # the response to the creation was lost, and the client retried it
            break
        if time.monotonic() - start > PATIENCE_S:
            raise Busy(
                f"{lock}: other processes keep moving the aliases, now {holder}; check the champion, and try again"
            )
        if holder is None:
            continue
        if holder != seen:
            seen, since = holder, time.monotonic()
            log.info("%s: waiting for its holder %s", lock, holder)
        if _dead(holder) or time.monotonic() - since >= STALE_S:
            _remove(client, lock)
            removed = True
        else:
            time.sleep(min(POLL_S, STALE_S))
    if removed:
        time.sleep(min(SETTLE_S, STALE_S))
        if _holder(client, lock) != own_holder:
            _take(client, lock, own_holder)


def _create(client: "MlflowClient", lock: str, holder: str) -> bool:
    """Create the lock; False if it exists."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(lock, tags={"holder": holder})
    except MlflowException as error:
        # MLflow looks an existing model up for its message, and does not find it if the lock was released in between.
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
        return False
    return True


def _holder(client: "MlflowClient", lock: str) -> str | None:
    """Return the holder of the lock; None if the lock is free."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_registered_model(lock).tags.get("holder", ""))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _dead(holder: str) -> bool:
    """Whether the holder is an ended process of this machine."""
    host, _, rest = holder.partition(" ")
    pid = rest.partition(" ")[0]
    if host != platform.node() or not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _remove(client: "MlflowClient", lock: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _tag(client: "MlflowClient", name: str, version: str, tags: dict[str, str]) -> None:
    """Set tags of a version. PromotionError if the version does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise PromotionError(f"{name} has no version {version}") from error
        raise


def numbered(version: str) -> str:
    """Return the version as MLflow writes it: 2 for 02. PromotionError unless it is a number."""
    if not version.strip().isdecimal():
        raise PromotionError(f"version {version[:40]!r}: expected a number, such as 3 in models:/NAME/3")
    return str(int(version))


def _reason(why: str) -> dict[str, str]:
    if len(why) > WHY:
        raise PromotionError(f"--why: the reason has {len(why):,} characters, at most {WHY:,} are accepted; shorten it")
    return {"promotion.why": why} if why.strip() else {}


def version_tags(client: "MlflowClient", name: str, version: str) -> dict[str, str]:
    """Return the tags of a version. PromotionError if the version does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_model_version(name, version).tags)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise PromotionError(f"{name} has no version {version}") from error
        raise


def _named(version: str | None) -> str:
    return "none" if version is None else f"version {version}"


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")
