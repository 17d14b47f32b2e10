"""Lightning's strategies for several ranks."""

import atexit
import os
from typing import TYPE_CHECKING, Any

from refract.models.training.lightning_imports import DDPStrategy, ModelParallelStrategy, Strategy
from refract.pipeline.training.attempt import current_attempt
from refract.pipeline.training.ranks import by_torchrun

if TYPE_CHECKING:
    import torch


class Replicas(DDPStrategy):
    """DDP whose validation needs no communication between ranks, as their numbers of validation batches differ.

    DDP's forward pass sends the buffers of rank 0, and would wait for ranks without a further batch.
    """

    def setup_environment(self) -> None:
        connect(self.root_device)
        super().setup_environment()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)


class Shards(ModelParallelStrategy):
    """FSDP: each rank has a part of the weights. Checkpoints are whole, as those of DDP."""

    def __init__(self, ranks: int) -> None:
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        connect(self.root_device)
        super().setup_environment()

    def validation_step(self, batch: Any, index: int) -> Any:
        """Validate the batch. After the last one, take part in the forward passes of the ranks that have further batches."""
        module = self.lightning_module
        assert module is not None
        with self.precision_plugin.val_step_context():
            result = module.validation_step(batch, index)
            trainer: Any = module.trainer
            if index + 1 == trainer.num_val_batches[0]:
                for _ in range(trainer.datamodule.validation_batches_of_rank_0() - index - 1):
                    module.predict_step(batch, index)
        return result


def strategy_of(ranks: int, mode: str, name: str) -> "Strategy | str":
    """Return the strategy for this number of ranks.

    mode: `model.mode`; modes that freeze layers leave parameters without a gradient, which plain DDP rejects; name: `trainer.strategy`.
    """
    if ranks == 1:
        return "auto"
    return Shards(ranks) if name == "fsdp" else Replicas(find_unused_parameters=mode != "fine-tune")


def connect(device: "torch.device") -> None:
    """Connect the ranks that torchrun started, with separate addresses for each restart.

    After a restart, torchrun's store still has the addresses of the earlier processes, which gloo would wait for (PyTorch 2.15).
    """
    import torch.distributed

    attempt = current_attempt() if by_torchrun() else None
    if attempt is None or torch.distributed.is_initialized():
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=torch.distributed.PrefixStore("group", attempt.store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        device_id=device if on_gpu else None,
    )
    if on_gpu:
        atexit.register(torch.distributed.destroy_process_group)  # else PyTorch warns
