"""ResNet-50 on synthetic 224² images, bf16 and channels_last: `refract train`'s module in Lightning compared with a plain loop.

Both train the same network object, so that one compilation serves both. The images are on the device, the targets on the processor, from
where both loops copy them in each step. Model FLOPs utilisation: the FLOPs of forward and backward pass, as PyTorch counts them for
convolutions and matrix products, times the rate, divided by the dense bf16 peak that NVIDIA's data sheet states for the card.
"""

import time
import warnings
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.plan import Clock, Options
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import device_facts, timed, wait

if TYPE_CHECKING:
    from refract.models.classifier import Classifier

PEAK_TFLOPS = (
    ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("A100", 312), ("L40S", 362), ("L4", 121), ("A10", 125),
)  # fmt: skip
"""Dense bf16, by a part of the card's name; the first that fits counts."""

WARM_UP, CLASSES = 3, 1000


def run(options: Options, record: Record, clock: Clock) -> None:
    """Measure the stage `resnet`."""
    import torch

    from refract.models.classifier import Classifier
    from refract.models.registry import build
    from refract.pipeline.training.callbacks.progress import quiet_lightning

    quiet_lightning()
    warnings.filterwarnings("ignore")
    device, quick = options.device, options.quick
    side, size = (32, 8) if quick else (224, 256)
    args = {"widths": [8]} if quick else {}
    torch.manual_seed(0)
    network = build("cnn" if quick else "resnet50", CLASSES, image_size=(side, side), args=args)
    classifier = Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3).to(device).to(memory_format=torch.channels_last)
    record.fact(**device_facts(device), batch=size, side=side)
    batch = {
        "images": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8).to(device, memory_format=torch.channels_last),
        "targets": torch.randint(0, CLASSES, (size,)),
        "indices": torch.arange(size),
    }  # fmt: skip
    flops = _flops(classifier, batch["images"][:2], device) / 2
    record.fact(gflop_per_image=round(flops / 1e9, 2))
    record.measure("bf16 matrix product", _product(device, 256 if quick else 8192))
    _compare(classifier, batch, "eager", record, clock, quick=quick, device=device)
    rate = record.value("Refract, eager")
    if device == "cpu":
        for name in ("compilation", "plain, compiled", "Refract, compiled", "Refract / plain, compiled"):
            record.skip(name, "the network is compiled on a GPU alone")
    else:
        started = time.perf_counter()
        classifier.network.compile()
        plain(classifier, batch, device, steps=WARM_UP)
        record.measure("compilation", time.perf_counter() - started)
        _compare(classifier, batch, "compiled", record, clock, quick=quick, device=device)
        rate = record.value("Refract, compiled")
    name = str(device_facts(device)["device"])
    peak = next((peak for part, peak in PEAK_TFLOPS if part in name), None)
    if peak is None:
        record.skip("model FLOPs utilisation", f"no peak is known for {name}")
    elif rate is not None:
        record.measure("model FLOPs utilisation", rate * flops / (peak * 1e12))


def _compare(
    classifier: "Classifier", batch: dict[str, Any], how: str, record: Record, clock: Clock, *, quick: bool, device: str
) -> None:
    """Measure both loops in alternating order."""
    steps, rounds = (4, 1) if quick else (20, 4)
    times: dict[str, list[float]] = {"plain": [], "Refract": []}
    budget = 0.25 * clock.left if how == "eager" else 0.8 * clock.left
    end = time.monotonic() + budget
    for number in range(rounds):
        if number and time.monotonic() > end:
            break
        for side in ("plain", "Refract") if number % 2 else ("Refract", "plain"):
            loop = plain if side == "plain" else through_lightning
            times[side].append(loop(classifier, batch, device, steps=steps))
    size = len(batch["targets"])
    for side, values in times.items():
        record.measure(f"{side}, {how}", size / median(values))
    record.measure(f"Refract / plain, {how}", median(times["plain"]) / median(times["Refract"]))


def plain(classifier: "Classifier", batch: dict[str, Any], device: str, *, steps: int) -> float:
    """Seconds a step of the loop that people write by hand."""
    from benchmarks.plain_loop import seconds_a_step

    total = steps + WARM_UP
    return seconds_a_step(classifier.to(device), [batch] * total, total, device, warm_up=WARM_UP, mixed=True)


def through_lightning(classifier: "Classifier", batch: dict[str, Any], device: str, *, steps: int) -> float:
    """Seconds a step of `ClassifierModule` in a Trainer."""
    import lightning
    from lightning.pytorch.callbacks import Callback
    from torch.utils.data import DataLoader

    from refract.models.training.lightning_module import ClassifierModule

    class Meter(Callback):
        started = seconds = 0.0

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (WARM_UP - 1, WARM_UP + steps - 1):
                wait(device)
                self.seconds, self.started = time.perf_counter() - self.started, time.perf_counter()

    meter = Meter()
    module = ClassifierModule(classifier, task="multiclass", num_classes=CLASSES, channels_last=True)
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=1, precision="bf16-mixed", callbacks=[meter],
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    batches = DataLoader([batch] * (WARM_UP + steps), batch_size=None)  # type: ignore[arg-type, var-annotated]
    trainer.fit(module, train_dataloaders=batches)
    return meter.seconds / steps


def _flops(classifier: "Classifier", images: Any, device: str) -> float:
    """FLOPs of a forward and a backward pass over the images."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        classifier(images).float().sum().backward()
    classifier.zero_grad()
    return float(counter.get_total_flops())


def _product(device: str, side: int) -> float:
    """TFLOP/s of a square bf16 matrix product."""
    import torch

    one = torch.randn(side, side, device=device).to(torch.bfloat16)
    other = torch.randn(side, side, device=device).to(torch.bfloat16)
    return 2 * side**3 / timed(lambda: one @ other, device, seconds=2, rounds=10) / 1e12
