"""Who is champion: MLflow's aliases `champion` and `previous`, moved so that at every instant a valid version is named.

`previous` is set first, then `champion`: a process that dies in between leaves the old champion where it was, and the move can be repeated.
MLflow has no exchange that only happens if nobody else made one, but refuses a second registered model of one name; a model named
`NAME.promoting` is the lock, for as long as the move takes. A lock can be deleted by its name alone, so who holds it is looked at again
before the champion is set, and the champion after.
"""

import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from refract.models.credentials import masked

log = logging.getLogger(__name__)

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
LAST = "promoted"
"""The registered model's tag that names its last promotion: a version's own tags go with the version when it is deleted."""

FIRST = "refract.first"
"""The version's tag with the alias that its training wants for a first version."""

WHY = 4000
"""Characters of a reason: MLflow's servers take 5,000 to 100,000, depending on their version."""

STALE_S = 60.0
"""A move takes a few requests: a lock that somebody else holds for so long, by the clock of who waits, was left by a process that died."""

PATIENCE_S = 2 * STALE_S
"""So long one waits at most for others who come and go: longer than for one who has died."""

SETTLE_S = 1.0
"""After a dead process's lock was removed: others who judged it so, too, may remove the new one, and have done so by then."""

POLL_S = 0.5


class PromotionError(ValueError):
    """The alias cannot be moved; the message says why, and what to do."""


class Busy(PromotionError):
    """Others move the aliases, one after the other, for longer than anyone waits."""


class RolledBack(PromotionError):
    """The version was champion, and a person went back to the one before."""


def aliases(client: Any, name: str) -> dict[str, str]:
    """alias → version, as text. PromotionError where there is no such model."""
    return {alias: str(version) for alias, version in _model(client, name).aliases.items()}


def promote(
    client: Any, name: str, version: str, *, instead_of: str | None, why: str = "", by_hand: bool = False
) -> None:
    """Make the version champion. instead_of: the version that it was compared with, None where there was none; any other champion by now
    raises PromotionError. why: kept as a tag of the version. by_hand: a person wants it, which counts for more than an earlier rollback.
    Once more for a version that is champion changes nothing but the reason.
    Waits for others who move the aliases; Busy where they do not come to an end.
    """
    version, reason = numbered(version), _reason(why)
    with _alone(client, name) as held:
        champion = aliases(client, name).get(CHAMPION)
        if champion == version:
            _tag(client, name, version, reason)
            return
        if champion != instead_of:
            raise PromotionError(
                f"{name}: the champion is {_named(champion)} by now, and version {version} was compared with {_named(instead_of)}; "
                "compare it again"
            )
        if not by_hand:
            _refuse_against_a_person(client, name, version, champion)
        _tag(client, name, version, {"promoted": _now()} | reason)
        if champion is not None:
            client.set_registered_model_alias(name, PREVIOUS, champion)
        _move(client, name, champion, version, held)
        client.set_registered_model_tag(name, LAST, version)


def name_version(client: Any, name: str, version: str, *, first: str) -> dict[str, str]:
    """Give a version that a training registered its alias. Repeating the call changes nothing.

    first: the alias of the model's first version. `champion` names it unless a champion is or was named, also where the first version is
    another one, whose process died before it could name it. Every other version becomes `challenger`, unless a newer version that is not
    champion is. Returns `alias`, what the version is named now, and `champion`, the champion's version, where there are such. Busy as
    `promote`.
    """
    lost = False
    if first == CHAMPION and (unnamed := _first_without_name(client, name, version)) is not None:
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


def _first_without_name(client: Any, name: str, version: str) -> str | None:
    """The model's first version, where it is to be champion: it is `version`, or its own process died before it could name it."""
    model = _model(client, name)
    if CHAMPION in model.aliases:
        return None
    lowest = _lowest(client, name)
    if lowest == version:
        return lowest
    wanted = version_tags(client, name, lowest).get(FIRST)
    if wanted is None and not {CHALLENGER, PREVIOUS} & model.aliases.keys() and LAST not in model.tags:
        wanted = CHAMPION  # from before the tag
    return lowest if wanted == CHAMPION else None


def _set_challenger(client: Any, name: str, version: str) -> None:
    """Set the alias. Of two processes that set a new alias at once, the database rejects one, whose second try replaces it."""
    from mlflow.exceptions import MlflowException

    for attempt in range(5):
        try:
            client.set_registered_model_alias(name, CHALLENGER, version)
            return
        except MlflowException:
            if attempt == 4:
                raise


def _lowest(client: Any, name: str) -> str:
    """The oldest version that the model has."""
    return str(min(int(found.version) for found in client.search_model_versions(of_model(name))))


def of_model(name: str) -> str:
    """MLflow's filter for the versions of a model: it takes either quote, and has no escape."""
    quote = '"' if "'" in name else "'"
    return f"name = {quote}{name}{quote}"


def way_back(client: Any, name: str) -> tuple[str, str]:
    """(the champion, the version that `rollback` goes back to). PromotionError where none is known."""
    now = aliases(client, name)
    champion, previous = now.get(CHAMPION), now.get(PREVIOUS)
    if previous is None or champion is None or previous == champion:
        raise PromotionError(f"{name}: no version is known to go back to; `previous` is {_named(previous)}")
    return champion, previous


def rollback(client: Any, name: str, *, expected: tuple[str, str] | None = None) -> tuple[str, str]:
    """(the version that is champion again, that which was). expected: what `way_back` said; PromotionError where it is another by now."""
    with _alone(client, name) as held:
        champion, previous = way_back(client, name)
        if expected not in (None, (champion, previous)):
            raise PromotionError(
                f"{name}: its aliases were moved meanwhile; the champion is {_named(champion)} by now, and {_named(previous)} was "
                "before it; look, and roll back again"
            )
        _tag(client, name, champion, {"rolled_back": _now()})
        _move(client, name, champion, previous, held)
        client.set_registered_model_alias(name, PREVIOUS, champion)
        return previous, champion


def _refuse_against_a_person(client: Any, name: str, version: str, champion: str | None) -> None:
    """RolledBack where the version was given up; PromotionError where no champion is named though there was one."""
    by_hand = f"`refract promote {name} {version}`"
    if since := version_tags(client, name, version).get("rolled_back"):
        raise RolledBack(f"{name}: version {version} was rolled back at {since}; {by_hand} makes it champion again")
    model = _model(client, name)
    last = model.tags.get(LAST) or model.aliases.get(PREVIOUS)
    if champion is None and last is not None:
        raise PromotionError(
            f"{name}: version {last} was promoted before, and no champion is named now, as after one was deleted; "
            f"name one by hand, as with {by_hand}"
        )


def _move(client: Any, name: str, champion: str | None, version: str, held: Callable[[], bool]) -> None:
    """Set the champion. PromotionError where another process has done so meanwhile."""
    still = held()
    now = aliases(client, name).get(CHAMPION)
    if still and now == champion:
        client.set_registered_model_alias(name, CHAMPION, version)
        now = aliases(client, name).get(CHAMPION)
        if now == version:
            return
    raise PromotionError(
        f"{name}: another process moved its aliases at the same time, and the champion is {_named(now)} by now; "
        f"compare version {version} with it again"
    )


def _model(client: Any, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise PromotionError(f"there is no registered model {name!r} at {masked(client.tracking_uri)}") from error
        raise


@contextmanager
def _alone(client: Any, name: str) -> Iterator[Callable[[], bool]]:
    """Hold the lock; gives what tells whether it is held still. Busy where others have it."""
    lock, own = f"{name}.promoting", f"{platform.node()} {os.getpid()} {uuid.uuid4().hex}"

    def held() -> bool:
        return _holder(client, lock) == own

    _take(client, lock, own)
    try:
        yield held
    finally:
        if held():
            _remove(client, lock)


def _take(client: Any, lock: str, own: str) -> None:
    """Create the lock, once it is free or was left by a dead process."""
    began = since = time.monotonic()
    seen, removed = None, False
    while not _create(client, lock, own):
        holder = _holder(client, lock)
        if holder == own:  # the answer to its creation was lost, and the client asked again
            break
        if time.monotonic() - began > PATIENCE_S:
            raise Busy(f"{lock}: other processes move the aliases all the time, now {holder}; look what came of it")
        if holder is None:
            continue
        if holder != seen:
            seen, since = holder, time.monotonic()
            log.info("%s: is held by %s, which is waited for", lock, holder)
        if _dead(holder) or time.monotonic() - since >= STALE_S:
            _remove(client, lock)
            removed = True
        else:
            time.sleep(min(POLL_S, STALE_S))
    if removed:
        time.sleep(min(SETTLE_S, STALE_S))
        if _holder(client, lock) != own:
            _take(client, lock, own)


def _create(client: Any, lock: str, own: str) -> bool:
    """False where there is one."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(lock, tags={"holder": own})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _holder(client: Any, lock: str) -> str | None:
    """Who has it; None where it is gone by now."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_registered_model(lock).tags.get("holder", ""))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _dead(holder: str) -> bool:
    """Whether it is a process of this machine that has ended."""
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


def numbered(version: str) -> str:
    """As MLflow writes it: 2 for 02. PromotionError where it is no number."""
    if not version.strip().isdecimal():
        raise PromotionError(f"a version is a number, as in models:/NAME/3, not {version[:40]!r}")
    return str(int(version))


def _reason(why: str) -> dict[str, str]:
    if len(why) > WHY:
        raise PromotionError(f"the reason (--why) has {len(why):,} characters, and may have {WHY:,}; shorten it")
    return {"promotion.why": why} if why.strip() else {}


def version_tags(client: Any, name: str, version: str) -> dict[str, str]:
    """PromotionError where there is no such version."""
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
