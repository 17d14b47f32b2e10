"""Poll a name in MLflow's registry. If it refers to a new version, load that version, test it, and swap to it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from refract.models.bundle.bundle import Bundle, BundleError, load_bundle
from refract.serve.rollout.canary import Challenge
from refract.serve.rollout.model_source import SourceError, mark_used, parse_result, subprocess_command
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.service import Service

logger = logging.getLogger(__name__)

Build = Callable[[Bundle], Engine]


def registry_watchers(
    service: Service, follow: str | None, challenge: Challenge | None, *, build: Build, every_s: float
) -> list["RegistryWatcher"]:
    """Build the watchers of the champion's and of the challenger's registry name, if they have one."""
    options: dict[str, Any] = {"build": build, "every_s": every_s, "rejected": service.models.rejected}
    options |= {"on_refusal": lambda: service.metrics.swapped("refused")}
    watchers = []
    if follow:
        watchers.append(
            RegistryWatcher(
                follow,
                take=service.models.swap,
                serving=lambda: service.models.engine,
                rollback_state=service.models,
                **options,
            )
        )
    if challenge and challenge.follow:
        settings = replace(challenge, engine=None)  # without the engine, which would stay in memory after a swap

        async def take(engine: Engine) -> None:
            await service.models.challenge(replace(settings, engine=engine))

        def challenging() -> Engine | None:
            return service.models.challenger.worker.engine if service.models.challenger else None

        watchers.append(RegistryWatcher(challenge.follow, take=take, serving=challenging, **options))
    return watchers


class RollbackState(Protocol):
    """The record of a rollback. rolled_back_from: the folder of the bundle that an operator rolled back, if any."""

    rolled_back_from: Path | None


class RegistryWatcher:
    """Resolves `source` every `every_s` seconds. A bundle that fails is logged and not tried again; the current model stays in service."""

    def __init__(
        self,
        source: str,
        *,
        build: Build,
        take: Callable[[Engine], Awaitable[None]],
        serving: Callable[[], Engine | None],
        rejected: set[Path],
        on_refusal: Callable[[], None],
        every_s: float,
        rollback_state: RollbackState | None = None,
    ) -> None:
        """build: builds an engine from a bundle; take: puts it into service, or raises BundleError; serving: returns the engine in service.

        rejected: folders that are not tried; on_refusal: called for each failed bundle; rollback_state: records the rolled-back bundle,
        which is not tried while the name refers to it.
        """
        self._source, self._build, self._every = source, build, every_s
        self._take, self._serving, self._rejected, self._on_refusal = take, serving, rejected, on_refusal
        self._rollback_state, self._logged = rollback_state, None  # type: RollbackState | None, Path | None

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await asyncio.sleep(self._every)
            try:
                await self.look()
            except Exception:  # no error here may stop the server
                logger.exception("polling %s for a new version failed", self._source)

    async def look(self) -> bool:
        """Resolve the name once. Returns whether a new bundle was put into service."""
        path, serving = await _resolve(self._source), self._serving()
        if serving is not None:  # its version may differ from the one that the name refers to
            mark_used(serving.bundle.path)
        if path is None or self._was_rolled_back(path):
            return False
        if (serving is not None and path == serving.bundle.path) or path in self._rejected:
            return False
        try:
            engine = await asyncio.to_thread(self._build, await self._load(path))
            await self._take(engine)
        except (BundleError, ValueError) as err:
            self._rejected.add(path)
            self._on_refusal()
            logger.warning("%s is rejected, the current model stays in service: %s", path, err)
            return False
        logger.info("%s (%s) is now in service as %s", engine.bundle.path.name, engine.bundle.digest[:12], self._source)
        return True

    def _was_rolled_back(self, path: Path) -> bool:
        """Return whether an operator rolled back this version, and the name has referred to no other version since."""
        if self._rollback_state is None:
            return False
        if path != self._rollback_state.rolled_back_from:
            self._rollback_state.rolled_back_from = self._logged = None
            return False
        if self._logged != path:
            logger.warning("%s still refers to %s, which was rolled back; it is not served", self._source, path.name)
        self._logged = path
        return True

    async def _load(self, path: Path) -> Bundle:
        try:
            return await asyncio.to_thread(load_bundle, path)
        except BundleError:  # the download may be damaged
            again = await _resolve(self._source, path)
            if again is None:
                raise
            return await asyncio.to_thread(load_bundle, again)


async def _resolve(source: str, damaged: Path | None = None) -> Path | None:
    """Return the bundle folder that the source refers to now. damaged: a download to replace. None if the lookup fails, which is logged."""
    command, options = subprocess_command(source, damaged)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, **options
    )
    try:
        out, _ = await process.communicate()
        return parse_result(source, out, process.returncode)
    except asyncio.CancelledError:
        process.kill()
        raise
    except SourceError as err:
        logger.warning("looking up %s failed: %s", source, err)
        return None
