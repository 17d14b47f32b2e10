"""fastai as documented: `vision_learner`, `aug_transforms`, one-cycle schedules, `fine_tune`, the best epoch by validation."""

import pandas as pd
import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.vision.all import (
    CrossEntropyLossFlat,
    ImageDataLoaders,
    Normalize,
    Resize,
    aug_transforms,
    set_seed,
    vision_learner,
)
from fastai.vision.all import accuracy as fastai_accuracy

from benchmarks.finetuners.task import answer, given, state


def main() -> None:
    task = given()
    set_seed(task.seed, reproducible=True)
    rows = [(*row, split == "val") for split in ("train", "val") for row in task.rows(split)]
    table = pd.DataFrame(rows, columns=["path", "label", "is_valid"])
    normalise = Normalize.from_stats((task.mean,) * 3, (task.std,) * 3, cuda=False)
    loaders = ImageDataLoaders.from_df(
        table, path="/", valid_col="is_valid", bs=task.batch_size, val_bs=task.batch_size, num_workers=2, device="cpu",
        item_tfms=Resize(round(1.5 * task.size)), batch_tfms=[*aug_transforms(size=task.size), normalise],
    )  # fmt: skip
    learner = vision_learner(
        loaders, task.network, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(), metrics=fastai_accuracy
    )  # fmt: skip
    learner.model[0].model.load_state_dict(state(task.weights), strict=True)
    best = SaveModelCallback(
        monitor="accuracy", fname=f"/tmp/fastai-{task.seed}-{task.mode}-{torch.randint(1 << 30, ())}"
    )
    with learner.no_bar(), learner.no_logging():
        if task.mode == "feature-extract":
            learner.freeze()
            learner.fit_one_cycle(task.epochs, 2e-3, cbs=best)
        elif task.mode == "fine-tune":
            learner.unfreeze()
            learner.fit_one_cycle(task.epochs, 1e-3, cbs=best)
        else:
            learner.fine_tune(task.epochs - 1, cbs=best)
        test = pd.DataFrame(task.rows("test"), columns=["path", "label"])
        loader = loaders.test_dl(test, with_labels=True)
        answer(float(learner.validate(dl=loader)[1]))


if __name__ == "__main__":
    main()
