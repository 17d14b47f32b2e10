"""What a run cost is counted from the machine's counters, and over all the processes that it took."""

from pathlib import Path

import pytest

from pipeline.cost import Cost, EnergyMeter


@pytest.fixture
def counters(tmp_path: Path) -> Path:
    """Two processors as Linux shows them, one of which may not be read, and a part of the first."""
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")
    for name in ("intel-rapl:0", "intel-rapl:0:0"):
        (tmp_path / name / "energy_uj").write_text("900000000\n")
    return tmp_path


def test_energy_is_counted_over_a_counter_that_begins_anew(counters: Path) -> None:
    meter = EnergyMeter(gpus=False, root=counters)
    assert meter.joules() == 0
    (counters / "intel-rapl:0" / "energy_uj").write_text("950000000\n")
    assert meter.joules() == 50
    (counters / "intel-rapl:0" / "energy_uj").write_text("20000000\n")
    assert meter.joules() == 50 + 50 + 20
    meter.close()
    assert EnergyMeter(gpus=False, root=counters / "none").joules() is None, "unknown is not nothing"


def test_what_was_counted_before_is_counted_on() -> None:
    cost = Cost("cpu")
    cost.load_state_dict({"minutes": 12.0})
    assert 12.0 < cost.figures()["minutes"] < 12.1
    cost.close()
