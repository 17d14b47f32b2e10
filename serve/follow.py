"""Follows a name in MLflow's registry: when it means another version, that one is loaded beside, tried, and answers from then on."""

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from models.bundle import Bundle, BundleError, load_bundle
from serve.engine import Engine
from serve.service import Service

logger = logging.getLogger(__name__)

Build = Callable[[Bundle], Engine]


class Follower:
    """Asks every `every_s` seconds what `source` means. A bundle that cannot answer is told and not tried again; the old one goes on."""

    def __init__(self, service: Service, source: str, *, build: Build, every_s: float) -> None:
        """build: makes an engine of what the name means."""
        self._service, self._source, self._every, self._build = service, source, every_s, build

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._every)
            try:
                await self.look()
            except Exception:  # whatever goes wrong here must not end the serving
                logger.exception("looking for a new version of %s failed", self._source)

    async def look(self) -> bool:
        """Whether another bundle answers now."""
        path = await _located(self._source)
        service = self._service
        if path is None or path == service.engine.bundle.path or path in service.rejected:
            return False
        try:
            engine = await asyncio.to_thread(lambda: self._build(load_bundle(path)))
            await service.swap(engine)
        except (BundleError, ValueError) as err:
            service.rejected.add(path)
            service.metrics.swapped("refused")
            logger.warning("%s is not served, and %s goes on: %s", path, service.engine.bundle.digest[:12], err)
            return False
        logger.warning("%s is served now, as %s", engine.bundle.digest[:12], self._source)
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
