"""A first config for a data set: what the pictures are decides the network and the policy, the machine decides the batch."""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from augment import ImageError, image_size
from models.texts.tokens import trimmed
from pipeline.data.manifest import Manifest, Sample

LOOKED_AT = 300
SMALL = 64


@dataclass(frozen=True)
class Survey:
    """side: median of the shorter sides, pixels; sizes: in words; device: cpu or cuda; notes: for the user."""

    side: int
    sizes: str
    device: str
    hub: bool
    notes: tuple[str, ...]


def survey(manifest: Manifest) -> Survey:
    """Look at the headers of up to 300 pictures, spread over the data, and at the machine."""
    import torch

    step = max(1, len(manifest.samples) // LOOKED_AT)
    sizes, bad = [], []
    for sample in manifest.samples[::step]:
        try:
            sizes.append(image_size(_header(sample)))
        except (ImageError, OSError):
            bad.append(sample.path)
    if not sizes:
        raise ImageError(f"{manifest.source}: none of the {len(bad)} pictures looked at can be read, as {bad[0]}")
    notes = []
    if bad:
        notes.append(
            f"note: {len(bad)} of {len(bad) + len(sizes)} pictures looked at cannot be read, as {bad[0]}; training will list all"
        )
    if manifest.empty:
        notes.append(
            f"note: {len(manifest.empty)} class folders are empty, as {manifest.empty[0]}; training will refuse them"
        )
    if manifest.loose:
        notes.append(
            f"note: {len(manifest.loose)} pictures lie in no class's folder, as {manifest.loose[0]}; training will leave them out"
        )
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    same = len(set(sizes)) == 1
    text = f"{heights[0]}×{widths[0]}" if same else f"{min(heights)}×{min(widths)} to {max(heights)}×{max(widths)}"
    side = int(median(min(size) for size in sizes))
    return Survey(
        side, text, "cuda" if torch.cuda.is_available() else "cpu", side >= SMALL and _hub_answers(), tuple(notes)
    )


def write_config(manifest: Manifest, found: Survey) -> str:
    """The YAML text."""
    import yaml

    def text(value: object) -> str:
        return (
            yaml.safe_dump(value, allow_unicode=True, default_flow_style=True, width=10_000)
            .removesuffix("\n...\n")
            .strip()
        )

    counts = manifest.counts()
    shown = ", ".join(f"{label} {count:,}" for label, count in list(counts.items())[:12])
    more = f" and {len(counts) - 12} more" if len(counts) > 12 else ""
    splits = (
        ", ".join(f"{split} {len(manifest.of(split)):,}" for split in manifest.splits())
        or "none given: drawn from the seed"
    )
    training = sum(sample.split in ("", "train") for sample in manifest.samples)
    small = found.side < SMALL
    network, weights, why = _network(small, found)
    words = sum(bool(trimmed(sample.text)) for sample in manifest.samples)
    if not any(sample.pictured for sample in manifest.samples):
        network, weights, why = "none", "none", "no pictures: the texts alone"
    signs = _are_signs(manifest.labels)
    policy = "digits" if signs else "cifar" if small else "fine-tune" if weights == "default" else "imagenet"
    if network == "none":
        policy = "none"
    # A picture is not worth enlarging: what is not there cannot be seen, and costs by its area.
    size = 32 if small else 224 if found.side >= 160 or weights == "default" else max(64, found.side // 32 * 32)
    resize = "squash" if small else "crop"
    gpu = found.device == "cuda"
    batch = (256 if small else 64) if gpu else (128 if small else 32)
    batch = max(8, min(batch, training // 8))
    # About as many pictures as a small network needs to converge, within what a person waits for.
    seen = 800_000 if gpu else 300_000 if small else 20_000
    epochs = max(5, min(30, seen // max(1, training)))
    lr = 5e-4 if weights == "default" else 2e-3
    source = manifest.source if manifest.source == "digits" else str(Path(manifest.source))
    model_name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(source).stem).strip("-") or "model"
    what = "texts" if network == "none" else f"pictures of {found.sizes} pixels"
    shape = f"""\
  image_size: {size}        # of the network's input, pixels
  resize: {resize}        # outside training: crop takes the centre, squash the whole picture
"""
    return f"""\
# {len(manifest.samples):,} {what}, {manifest.task}, {len(manifest.labels)} labels: {_comment(shown + more)}
# Splits: {splits}. Written by `refract init`; train with `refract train THIS_FILE`.
# Every key can be set on the command line too: --optim.lr 1e-3. `refract train --help` lists them all.

data:
  source: {text(source)}
  task: {manifest.task}
{"" if network == "none" else shape}  val_share: 0.1         # drawn from the training samples where there is no `val` split
  test_share: 0.2        # drawn as hold-out where there is no `test` split
  batch_size: {batch}
  workers: null          # processes that load samples; null chooses for this machine
  on_bad_file: error     # skip leaves unreadable files out

augment:
  policy: {policy}        # a preset, a YAML file, or a list such as [{{HorizontalFlip: {{p: 0.5}}}}]{_policy_note(policy)}

model:
  name: {network}         # {why}
  weights: {weights}          # none, default (pretrained), or a file
  mode: fine-tune        # of all weights; feature-extract trains the new head only, gradual unfreezes from the head down

{_texts(words, len(manifest.samples))}optim:
  name: adamw
  lr: {lr:g}
  weight_decay: 0.05
  schedule: cosine
  warmup: 0.1

loss:
  label_smoothing: 0.0

trainer:
  max_epochs: {epochs}
  seed: 0
  precision: auto        # bf16 or fp16 where the device computes faster in it

tracking:
  experiment: refract
  model_name: {text(model_name)}   # registered in MLflow: version 1 is champion, later ones challenger; null registers nothing
"""


def _texts(words: int, count: int) -> str:
    """The section `text`, where there are any."""
    if not words:
        return ""
    return f"""\
text:
  name: hashing          # {words:,} of {count:,} have a text: n-grams by their hashes; or a transformer's folder or hub name; or none
  max_length: 64         # words

"""


def _network(small: bool, found: Survey) -> tuple[str, str, str]:
    if small:
        return "resnet20", "none", "a residual network for pictures of about 32×32 pixels"
    if found.hub:
        return "resnet18", "default", "pretrained on ImageNet; resnet50 is better and slower"
    return (
        "resnet18",
        "none",
        "from scratch, as the hub of pretrained weights did not answer; give weights: a file to fine-tune",
    )


def _policy_note(policy: str) -> str:
    if policy == "digits":
        return "\n                         # no flips: the labels look like signs, and a mirrored sign is another"
    if policy == "none":
        return (
            "\n                         # texts are changed by [{WordSwap: {p: 0.3}}] and what else `refract ops` lists"
        )
    return "\n                         # it mirrors pictures: take another where left and right have a meaning"


def _are_signs(labels: tuple[str, ...]) -> bool:
    """Single letters and digits, or their names: handwriting, plates, alphabets."""
    return all(
        len(label) == 1 or re.fullmatch(r"\d+|zero|one|two|three|four|five|six|seven|eight|nine", label.lower())
        for label in labels
    )


def _comment(text: str) -> str:
    return " ".join(text.split())


def _header(sample: Sample) -> bytes:
    """Enough of the file for its header: reading whole photos only for their sizes takes long on a network drive."""
    if sample.data is not None:
        return sample.data
    with Path(sample.path).open("rb") as file:
        start = file.read(1 << 16)
        try:
            image_size(start)
            return start
        except ImageError:  # a header longer than that, or a TIFF, whose directory is at its end
            return start + file.read()


def _hub_answers() -> bool:
    """Whether pretrained weights can be had: in the cache, or by the network within two seconds."""
    cache = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch")) / "hub" / "checkpoints"
    if any(cache.glob("resnet18-*.pth")):
        return True
    try:
        socket.create_connection(("download.pytorch.org", 443), timeout=2).close()
        return True
    except OSError:
        return False
