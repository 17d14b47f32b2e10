"""The cost of a run is read from the hardware counters and summed over its processes."""

from pathlib import Path

import pytest

from refract.pipeline.training.cost import Cost, EnergyMeter


@pytest.fixture
def counters(tmp_path: Path) -> Path:
    """Linux counters of two processors, the second unreadable, of a part of the first, and of the whole machine."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "package-1", "intel-rapl:2": "psys"}
    for folder, name in names.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(f"{name}\n")
        (tmp_path / folder / "max_energy_range_uj").write_text("1000000000\n")
        if name != "package-1":
            (tmp_path / folder / "energy_uj").write_text("900000000\n")
    return tmp_path


def test_energy_is_counted_across_a_counter_wrap_around(counters: Path) -> None:
    meter = EnergyMeter(gpus=False, root=counters)
    assert meter.joules() == 0
    for folder in counters.glob("*/energy_uj"):
        folder.write_text("950000000\n")
    assert meter.joules() == 50
    (counters / "intel-rapl:0" / "energy_uj").write_text("20000000\n")
    assert meter.joules() == 50 + 50 + 20
    meter.close()
    assert EnergyMeter(gpus=False, root=counters / "none").joules() is None, "unknown is not nothing"


def test_a_counter_at_its_beginning_counts(counters: Path) -> None:
    (counters / "intel-rapl:0" / "energy_uj").write_text("0\n")
    meter = EnergyMeter(gpus=False, root=counters)
    (counters / "intel-rapl:0" / "energy_uj").write_text("3000000\n")
    assert meter.joules() == 3
    meter.close()


def test_the_energy_of_a_run_is_in_kilojoules(counters: Path) -> None:
    cost = Cost("cpu")
    cost.close()
    cost._energy = EnergyMeter(gpus=False, root=counters)
    for folder in counters.glob("*/energy_uj"):
        folder.write_text("950000000\n")
    assert cost.totals()["kilojoules"] == 0.05
    cost.close()


def test_a_resumed_run_adds_the_earlier_totals() -> None:
    before = Cost("cpu")
    before._started -= 12 * 60
    cost = Cost("cpu")
    cost.load_state_dict(before.state_dict())
    assert 12.0 < cost.totals()["minutes"] < 12.1
    cost.load_state_dict({"minutes": 12.0})
    assert set(cost.totals()) == {"minutes"}, "energy that was not counted throughout is not reported"
    for counted in (before, cost):
        counted.close()
