"""What a run and its bundle record of the image network: enough to build it again."""

from typing import Any

from refract.pipeline.config.config import Config


def network_record(config: Config) -> dict[str, Any]:
    """Return the bundle's record of the image network."""
    head = {} if config.model.head_name == "linear" else {"head": config.model.head_name}
    size = list(config.data.sides())
    return {"network": {"name": config.model.name, "image_size": size, "args": config.model.args | head}}
