"""Check the model that a request of the Open Inference Protocol names."""

from refract.models.bundle.bundle import Bundle
from refract.serve.errors import RequestError


def check_model(served: Bundle, name: str, version: str | None) -> None:
    """Raise RequestError 404 unless `served` has this name, and this version, or `version` is None."""
    if name != served.info.name:
        message = f"model {name[:40]!r} is not served; this server serves {served.info.name!r}"
        raise RequestError(404, "unknown_model", message)
    check_version(served, version)


def check_version(bundle: Bundle, version: str | None) -> None:
    """Raise RequestError 404 if `version` is not the bundle's; None accepts any."""
    if version is not None and version != bundle.digest[:16]:
        message = f"model version {version[:40]!r} is not served; the served version is {bundle.digest[:16]!r}"
        raise RequestError(404, "unknown_model", message)
