"""Lightning and torchmetrics for the modules of Refract that train. Only this module imports the two packages.

Lightning imports torchmetrics for one class. The `__init__.py` of torchmetrics imports every family of metrics, and with them transformers,
torchvision and scipy.signal: 3.7 s of a core in each process that trains. Here `torchmetrics` and `torchmetrics.functional` run
their `__init__.py` when a program first reads a name that they do not have yet. Their submodules are imported as always.
"""

# ruff: noqa: E402

import importlib
import logging
import sys
import threading
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_PACKAGES = ("torchmetrics", "torchmetrics.functional")
_waiting: set[str] = set()
_lock = threading.RLock()


class DeferredPackage(ModuleType):
    """A package whose `__init__.py` runs when a program first reads a name that the package does not have yet."""

    def __getattr__(self, name: str) -> Any:
        _run_init(self)
        return ModuleType.__getattribute__(self, name)  # `_run_init` changed the class

    def __dir__(self) -> list[str]:
        _run_init(self)
        return [*ModuleType.__dir__(self)]


def _run_init(package: ModuleType) -> None:
    """Run `__init__.py` once. Another thread waits for its end; the code of `__init__.py` itself reads the names that exist so far."""
    with _lock:
        spec = package.__spec__
        if package.__name__ not in _waiting or spec is None or spec.loader is None:
            return
        _waiting.remove(package.__name__)
        try:
            spec.loader.exec_module(package)
        except BaseException:
            _waiting.add(package.__name__)
            raise
        package.__class__ = ModuleType


def defer_torchmetrics() -> None:
    """Put the deferred packages into `sys.modules`, with the names that Lightning and the submodules of torchmetrics read from them.

    Does nothing if the program has imported torchmetrics. Leaves torchmetrics to an ordinary import if its submodules read other names.
    """
    if "torchmetrics" in sys.modules or find_spec("torchmetrics") is None:
        return
    try:
        for name in _PACKAGES:
            _put(name)
        package: Any = sys.modules["torchmetrics"]
        package.__version__ = version("torchmetrics")
        package._logger = logging.getLogger("torchmetrics")
        importlib.import_module("torchmetrics.utilities")  # which `torchmetrics.metric` expects to be imported
        package.Metric = importlib.import_module("torchmetrics.metric").Metric
        package.MetricCollection = importlib.import_module("torchmetrics.collections").MetricCollection
    except (ImportError, AttributeError):
        _waiting.clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
            del sys.modules[name]


def _put(name: str) -> None:
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package = module_from_spec(spec)
    package.__class__ = DeferredPackage
    _waiting.add(name)
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


defer_torchmetrics()

import lightning
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat

__all__ = [
    "Callback",
    "Checkpoint",
    "DDPStrategy",
    "EarlyStopping",
    "MeanMetric",
    "Metric",
    "ModelCheckpoint",
    "ModelParallelStrategy",
    "MulticlassAccuracy",
    "MultilabelAveragePrecision",
    "OptimizerLRScheduler",
    "Profiler",
    "Strategy",
    "TorchCheckpointIO",
    "Tuner",
    "dim_zero_cat",
    "lightning",
]
