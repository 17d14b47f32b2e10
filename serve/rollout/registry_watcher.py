"""Follows a name in MLflow's registry: when it means another version, that one is loaded beside, tried, and taken."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from refract.models.bundle.bundle import Bundle, BundleError, load_bundle
from refract.serve.rollout.canary import Challenge
from refract.serve.rollout.model_source import SourceError, answer, elsewhere, mark_used
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.service import Service

logger = logging.getLogger(__name__)

Build = Callable[[Bundle], Engine]


def followers(
    service: Service, follow: str | None, challenge: Challenge | None, *, build: Build, every_s: float
) -> list["RegistryWatcher"]:
    """Of the champion's name and of the challenger's, where they have one."""
    options: dict[str, Any] = {"build": build, "every_s": every_s, "rejected": service.rejected}
    options |= {"on_refusal": lambda: service.metrics.swapped("refused")}
    found = []
    if follow:
        found.append(
            RegistryWatcher(follow, take=service.swap, serving=lambda: service.engine, obeyed=service, **options)
        )
    if challenge and challenge.follow:
        terms = replace(challenge, engine=None)  # which is not kept here: it will be exchanged

        async def take(engine: Engine) -> None:
            await service.challenge(replace(terms, engine=engine))

        def challenging() -> Engine | None:
            return service.challenger.lane.engine if service.challenger else None

        found.append(RegistryWatcher(challenge.follow, take=take, serving=challenging, **options))
    return found


class Obeyed(Protocol):
    """left: the folder of the bundle that a person went back from, if any."""

    left: Path | None


class RegistryWatcher:
    """Asks every `every_s` seconds what `source` means. A bundle that cannot answer is told and not tried again; the old one goes on."""

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
        obeyed: Obeyed | None = None,
    ) -> None:
        """build: makes an engine of what the name means; take: has it serve, or raises BundleError; serving: the one that does; rejected:
        folders that are not tried; obeyed: tells what a person went back from, which is not tried while the name goes on to mean it."""
        self._source, self._build, self._every = source, build, every_s
        self._take, self._serving, self._rejected, self._on_refusal = take, serving, rejected, on_refusal
        self._obeyed, self._told = obeyed, None  # type: Obeyed | None, Path | None

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._every)
            try:
                await self.look()
            except Exception:  # whatever goes wrong here must not end the serving
                logger.exception("looking for a new version of %s failed", self._source)

    async def look(self) -> bool:
        """Whether another bundle was taken now."""
        path, serving = await _located(self._source), self._serving()
        if serving is not None:  # which may be another than the name means
            mark_used(serving.bundle.path)
        if path is None or self._left(path):
            return False
        if (serving is not None and path == serving.bundle.path) or path in self._rejected:
            return False
        try:
            engine = await asyncio.to_thread(self._build, await self._loaded(path))
            await self._take(engine)
        except (BundleError, ValueError) as err:
            self._rejected.add(path)
            self._on_refusal()
            logger.warning("%s is not served, what was served goes on: %s", path, err)
            return False
        logger.info("%s (%s) was taken, as %s", engine.bundle.path.name, engine.bundle.digest[:12], self._source)
        return True

    def _left(self, path: Path) -> bool:
        """Whether a person went back from what the name means, and it has meant nothing else since."""
        if self._obeyed is None:
            return False
        if path != self._obeyed.left:
            self._obeyed.left = self._told = None
            return False
        if self._told != path:
            logger.warning(
                "%s means %s still, which is not served: a person went back from it", self._source, path.name
            )
        self._told = path
        return True

    async def _loaded(self, path: Path) -> Bundle:
        try:
            return await asyncio.to_thread(load_bundle, path)
        except BundleError:  # the download may have been damaged since
            again = await _located(self._source, path)
            if again is None:
                raise
            return await asyncio.to_thread(load_bundle, again)


async def _located(source: str, damaged: Path | None = None) -> Path | None:
    """Where the bundle lies that the source means now; damaged: a download that is fetched again. None, told in the log, where that cannot
    be found out."""
    command, options = elsewhere(source, damaged)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, **options
    )
    try:
        out, _ = await process.communicate()
        return answer(source, out, process.returncode)
    except asyncio.CancelledError:
        process.kill()
        raise
    except SourceError as err:
        logger.warning("%s cannot be looked up: %s", source, err)
        return None
