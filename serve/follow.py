"""Follows a name in MLflow's registry: when it means another version, that one is loaded beside, tried, and taken."""

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.bundle import Bundle, BundleError, load_bundle
from serve.challenge import Challenge
from serve.engine import Engine
from serve.service import Service

logger = logging.getLogger(__name__)

Build = Callable[[Bundle], Engine]


def followers(
    service: Service, follow: str | None, challenge: Challenge | None, *, build: Build, every_s: float
) -> list["Follower"]:
    """Of the champion's name and of the challenger's, where they have one."""
    options: dict[str, Any] = {"build": build, "every_s": every_s, "rejected": service.rejected}
    options |= {"on_refusal": lambda: service.metrics.swapped("refused")}
    found = []
    if follow:
        found.append(Follower(follow, take=service.swap, serving=lambda: service.engine, **options))
    if challenge and challenge.follow:

        async def take(engine: Engine) -> None:
            await service.challenge(replace(challenge, engine=engine))

        def challenging() -> Engine | None:
            return service.challenger.lane.engine if service.challenger else None

        found.append(Follower(challenge.follow, take=take, serving=challenging, **options))
    return found


class Follower:
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
    ) -> None:
        """build: makes an engine of what the name means; take: has it serve, or raises BundleError; serving: the one that does; rejected:
        folders that are not tried."""
        self._source, self._build, self._every = source, build, every_s
        self._take, self._serving, self._rejected, self._on_refusal = take, serving, rejected, on_refusal

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
        if path is None or (serving is not None and path == serving.bundle.path) or path in self._rejected:
            return False
        try:
            engine = await asyncio.to_thread(lambda: self._build(load_bundle(path)))
            await self._take(engine)
        except (BundleError, ValueError) as err:
            self._rejected.add(path)
            self._on_refusal()
            logger.warning("%s is not served, what was served goes on: %s", path, err)
            return False
        logger.warning("%s (%s) was taken, as %s", engine.bundle.path.name, engine.bundle.digest[:12], self._source)
        return True


async def _located(source: str) -> Path | None:
    """Where the bundle lies that the source means now. In a process of its own: MLflow takes seconds and memory to import."""
    command = [sys.executable, "-m", "serve.source", source]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        out, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        raise
    found = json.loads(out.splitlines()[-1]) if process.returncode == 0 and out.strip() else {}
    if "path" not in found:
        logger.warning("%s cannot be looked up: %s", source, found.get("error", f"exit code {process.returncode}"))
        return None
    return Path(found["path"])
