"""Serve a model and hot-swap it as fast as possible between two bundles, each loaded anew; run by `benchmarks.bounds`.

python -m benchmarks.servers.swapping BUNDLE OTHER PORT COUNT
"""

import asyncio
import sys
import threading
from pathlib import Path

from refract.models.bundle.bundle import load_bundle
from refract.serve.http.app import create_app
from refract.serve.http.transport.server import Server, listen
from refract.serve.runtime.engine import Engine


def main() -> None:
    """Print `ready`, and after the hot swaps their number and that of the inference threads."""
    folders, port, count = [Path(arg) for arg in sys.argv[1:3]], int(sys.argv[3]), int(sys.argv[4])
    app = create_app(load_bundle(folders[0]))
    service = app.state.service

    async def exchange() -> None:
        while not service.models.ready:
            await asyncio.sleep(0.05)
        print("ready", flush=True)
        for k in range(count):
            engine = await asyncio.to_thread(Engine, load_bundle(folders[(k + 1) % 2]))
            await service.models.swap(engine)
        threads = sum(thread.name == "inference" for thread in threading.enumerate())
        print(f"{count} {threads}", flush=True)

    server = Server(app, on_ready=lambda: tasks.append(asyncio.get_running_loop().create_task(exchange())))
    tasks: list[asyncio.Task[None]] = []
    server.run(sockets=[listen("127.0.0.1", port)])


if __name__ == "__main__":
    main()
