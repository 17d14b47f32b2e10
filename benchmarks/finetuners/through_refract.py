"""Refract with its defaults: nothing is set but the data, the network, the mode and the number of epochs."""

import logging
import tempfile

from benchmarks.finetuners.task import answer, given


def main() -> None:
    from refract.pipeline.config.config import load_config
    from refract.pipeline.training.run import train

    task = given()
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as runs:
        values = {
            "data.source": task.manifest,
            "data.image_size": task.size,
            "data.batch_size": task.batch_size,
            "data.features": f"{runs}/features",
            "augment.policy": "fine-tune",
            "model.name": f"timm/{task.network}",
            "model.weights": task.weights,
            "model.mode": task.mode,
            "trainer.max_epochs": task.epochs,
            "trainer.seed": task.seed,
            "trainer.runs_dir": runs,
            "tracking.enabled": "false",
            "evaluation.robustness": "none",
        }
        options = [f"--{key}={value}" for key, value in values.items()]
        result = train(load_config(None, [*options, *(f"--{setting}" for setting in task.settings)]))
        assert result is not None
        answer(result.metrics["accuracy"])


if __name__ == "__main__":
    main()
