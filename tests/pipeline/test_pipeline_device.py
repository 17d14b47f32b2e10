"""The device and precision that `auto` chooses."""

import pytest
import torch

from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.sections import TrainerConfig
from refract.pipeline.training.device import choose_device, choose_precision


@pytest.mark.parametrize(
    ("processor", "precision"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16-mixed"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "32-true"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bf16-mixed"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, "32-true"),
        ({"cpu_name": None, "bf16": True}, "bf16-mixed"),
        ({}, "32-true"),
    ],
)
def test_a_cpu_trains_in_bf16_only_if_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, processor: dict[str, object], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert choose_precision(TrainerConfig(), "cpu") == precision
    assert choose_precision(TrainerConfig(precision="fp32"), "cpu") == "32-true"
    assert choose_precision(TrainerConfig(precision="bf16"), "cpu") == "bf16-mixed"


def test_an_unsupported_device_or_precision_is_rejected() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_precision(TrainerConfig(precision="fp16"), "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU on this machine"):
            choose_device("cuda")
