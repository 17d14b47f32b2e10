"""`refract replay-batch FILE`"""

import argparse
from pathlib import Path

from refract import output
from refract.pipeline import console


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract replay-batch",
        description="Run a training batch with a non-finite loss again, with the weights of that step, and report each layer's output.",
    )
    parser.add_argument("file", type=Path, help="the bad-batch.pt that training wrote")
    console.add_plugin_option(parser)
    args = parser.parse_args(argv)
    return console.run("replay-batch", lambda: _replay(args.file), plugins=args.plugin)


def _replay(path: Path) -> int:
    import torch

    from refract.models.classifier import inputs_of
    from refract.models.factory import make_classifier
    from refract.models.training.objective import classification_loss
    from refract.pipeline.config.config import ConfigError
    from refract.pipeline.training.failing_batch import first_not_finite, layers

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        weights, batch = stored["weights"], stored["batch"]
        if "pictured" in batch:  # the key of earlier versions
            batch["has_image"] = batch.pop("pictured")
        options = {name: stored[name] for name in ("mean", "std", "normalize", "text", "files")}
        classifier = make_classifier(stored["network"], stored["classes"], **options)
        classifier.load_state_dict(weights)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many types for other files
        raise ConfigError(
            f"{path}: is not a bad-batch.pt file of a training run ({type(error).__name__}: {error})"
        ) from error
    inputs = inputs_of(batch)
    print(f"epoch {stored['epoch']}, step {stored['step']}, seed {stored['seed']}: {len(batch['targets'])} images")
    print(f"{'layer':<40} {'kind':<20} {'lowest':>12} {'highest':>12} {'non-finite':>11}")
    for name, kind, values in layers(classifier, inputs):
        non_finite = 1 - float(values.isfinite().float().mean())
        print(f"{name:<40} {kind:<20} {float(values.min()):>12.4g} {float(values.max()):>12.4g} {non_finite:>11.1%}")
    with torch.no_grad():
        logits = classifier.train()(*inputs)[: len(batch["targets"])]
    losses = [
        float(classification_loss(logits[i : i + 1], batch["targets"][i : i + 1], task=stored["task"]))
        for i in range(len(logits))
    ]
    worst = sorted(range(len(losses)), key=lambda i: (losses[i] == losses[i], -losses[i]))[:8]
    print("largest losses, without mixing and label smoothing:")
    for i in worst:
        index, image, plan = stored["samples"][i]
        print(f"  {losses[i]:>10.4g}  sample {index}, {image}\n              {plan}")
    first = first_not_finite(classifier, inputs)
    print(first)
    samples = [
        dict(zip(("index", "image", "plan"), stored["samples"][i], strict=True)) | {"loss": losses[i]} for i in worst
    ]
    output.result(
        {
            "epoch": stored["epoch"],
            "step": stored["step"],
            "seed": stored["seed"],
            "largest_losses": samples,
            "first": first,
        }
    )
    return 0
