"""The tests behind `refract drift`: against numbers by hand and by brute force, and how often they cry wolf."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from refract.pipeline.drift.compare import compare, far_from
from refract.pipeline.drift.profile import WIDEST, Profile, folded
from refract.pipeline.drift.thresholds import THRESHOLDS, Threshold, parse_thresholds
from refract.pipeline.drift.two_samples import MOST, SMOOTHING, at_most, classifier, counts, holm, kolmogorov, mmd, psi

LABELS = ("a", "b", "c")


def profile_of(seed: int, count: int = 120, *, labels: bool = True, **changed) -> Profile:
    """Of one kind, whatever the seed: ten features, three classes, a confidence and a brightness."""
    rng = np.random.default_rng([11, seed])
    classes = rng.multinomial(count, [0.5, 0.3, 0.2])
    values = {
        "features": rng.normal(size=(count, 10)).astype(np.float32),
        "answered": classes,
        "confidence": rng.beta(8, 2, count).astype(np.float32),
        "statistics": {"brightness": rng.normal(0.5, 0.1, count).astype(np.float32)},
        "classes": dict(zip(LABELS, rng.multinomial(count, [0.5, 0.3, 0.2]).tolist(), strict=True)) if labels else None,
    }
    return Profile(count, LABELS, **{**values, **changed})


def levels(drift) -> dict[str, str]:
    return {check.name: check.level for check in drift.checks if check.level != "none"}


def test_mmd_is_the_formula_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 3)), rng.normal(0.5, 1, size=(7, 3))
    rows = np.concatenate([x, y])
    middle = np.median([((rows[i] - rows[j]) ** 2).sum() for i in range(16) for j in range(i)])

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / (2 * middle)))

    def estimate(x: np.ndarray, y: np.ndarray) -> float:
        within = [
            sum(k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j) / (len(a) * (len(a) - 1))
            for a in (x, y)
        ]
        return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))

    statistic = mmd(x, y, permutations=99)
    assert statistic.value == pytest.approx(estimate(x, y), abs=1e-5)
    draws = [rows[rng.permutation(16)] for _ in range(999)]
    share = np.mean([estimate(draw[:9], draw[9:]) >= statistic.value for draw in draws])
    assert mmd(x, y).p == pytest.approx(share, abs=0.05)
    assert mmd(x, y, seed=3) == mmd(x, y, seed=3), "seeded"


def test_mmd_of_equal_rows_and_of_very_large_numbers_is_a_number() -> None:
    ones = np.ones((30, 4), np.float32)
    assert mmd(ones, ones).p == 1
    assert mmd(ones, ones + 1).p < 0.001
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.normal(1, 1, size=(60, 4))
    assert mmd(x * 1e4 + 1e8, y * 1e4 + 1e8).value == pytest.approx(mmd(x, y).value, abs=1e-3)


def test_p_values_of_one_kind_are_uniform() -> None:
    rng = np.random.default_rng(4)
    pairs = [(rng.normal(size=(40, 6)), rng.normal(size=(55, 6))) for _ in range(150)]
    uniform = [mmd(x, y, permutations=300, seed=i).p for i, (x, y) in enumerate(pairs)]
    assert kstest(uniform, "uniform").pvalue > 0.01
    judged = [classifier(x, y, seed=i).p for i, (x, y) in enumerate(pairs)]
    assert np.mean(np.array(judged) <= 0.05) <= 0.1
    sparse = [counts(*rng.multinomial([12, 18], [0.7, 0.1, 0.1, 0.05, 0.05]), seed=i).p for i in range(150)]
    assert np.mean(np.array(sparse) <= 0.05) <= 0.09 and np.mean(np.array(sparse) <= 0.5) <= 0.6


def test_the_classifier_tells_apart_what_differs_in_one_direction() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 20)), rng.normal(size=(700, 20))
    y[:, 3] += 2
    statistic = classifier(x, y)
    assert statistic.value > 0.7 and statistic.p < 1e-6 and statistic.chance == 0.5
    assert 0.3 < classifier(x, rng.normal(size=(700, 20))).value < 0.65, (
        "though there are more of the one than of the other"
    )


def test_psi_and_chi_squared_are_those_by_hand() -> None:
    before, after = np.array([50, 30, 20]), np.array([30, 40, 30])
    e, a = np.array([50.5, 30.5, 20.5]) / 101.5, np.array([30.5, 40.5, 30.5]) / 101.5
    assert SMOOTHING == 0.5 and psi(before, after) == pytest.approx(((a - e) * np.log(a / e)).sum())
    statistic = counts(before, after)
    # χ² = 2 · (10²/40 + 5²/35 + 5²/25) = 8.4286, two degrees of freedom: exp(−χ²/2)
    assert statistic.p == pytest.approx(np.exp(-(2 * (100 / 40 + 25 / 35 + 25 / 25)) / 2))
    assert statistic.chance == pytest.approx(2 * (1 / 100 + 1 / 100))
    assert counts(np.array([5, 0, 0]), np.array([5, 0, 0])) == (0, 0, 1), "one class alone"
    assert counts(np.array([5, 5]), np.array([0, 0])).p == 1


def test_of_rare_classes_p_is_that_of_drawn_tables() -> None:
    # All tables with these sums: the first row has k of 3 in the second class, k hypergeometric; as far off as 0 are k = 0 and k = 3.
    statistic = counts(np.array([10, 0]), np.array([7, 3]))
    assert statistic.p == pytest.approx(2 * (10 * 9 * 8) / (20 * 19 * 18), abs=0.03)


@given(st.integers(2, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 500), min_size=n, max_size=n)] * 2)))
@settings(max_examples=80)
def test_psi_is_symmetric_never_negative_and_blind_to_the_order(pair: tuple[list[int], list[int]]) -> None:
    e, a = map(np.array, pair)
    value = psi(e, a)
    assert value >= -1e-12 and np.isfinite(value) and value == pytest.approx(psi(a, e))
    assert psi(e, e) == 0 and value == pytest.approx(psi(e[::-1], a[::-1]))


def test_kolmogorov_and_holm_by_hand() -> None:
    statistic = kolmogorov(np.arange(10.0), np.arange(5, 15.0))
    assert statistic.value == 0.5 and statistic.chance == pytest.approx(0.8687 * np.sqrt(0.2), abs=1e-3)
    rng = np.random.default_rng(0)
    chances = [kolmogorov(rng.random(80), rng.random(60)) for _ in range(200)]
    assert np.mean([one.value for one in chances]) == pytest.approx(chances[0].chance, rel=0.1)
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []


def test_nothing_drifts_between_halves_of_one_kind() -> None:
    """40 pairs of samples that differ by chance alone: the verdict is to be wrong at most once in twenty."""
    for test in ("mmd", "classifier"):
        wrong = [
            compare(profile_of(2 * i), profile_of(2 * i + 1), test=test, seed=i).level != "none" for i in range(40)
        ]
        assert sum(wrong) <= 2, test


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features", lambda profile: {"features": profile.features + 0.8}),
        ("answers", lambda profile: {"answered": np.array([20, 30, 70])}),
        ("confidence", lambda profile: {"confidence": profile.confidence * 0.7}),
        ("brightness", lambda profile: {"statistics": {"brightness": profile.statistics["brightness"] + 0.2}}),
        ("classes", lambda profile: {"classes": {"a": 20, "b": 30, "c": 70}}),
    ],
)
def test_each_kind_of_drift_is_reported_by_its_own_check(name: str, change) -> None:
    profile = profile_of(1)
    drift = compare(profile_of(0), profile_of(1, **change(profile)))
    assert levels(drift) == {name: "stop"} and drift.level == "stop"


def test_a_trifle_of_many_images_is_no_alarm_and_few_images_are_none() -> None:
    rng = np.random.default_rng(0)
    many = [rng.normal(shift, 1, 20_000).astype(np.float32) for shift in (0, 0.08)]
    drift = compare(*(profile_of(0, statistics={"brightness": values}) for values in many))
    check = next(check for check in drift.checks if check.name == "brightness")
    assert check.p < 1e-6 and 0 < check.effect < 0.1 and check.level == "none", "improbable, but small"
    few = compare(profile_of(0, 25), profile_of(5, 25, labels=False))
    assert max(check.value for check in few.checks) > 0.1 and few.level == "none", "large, but not improbable"
    with pytest.raises(ValueError, match="19 new ones: 20 of each are needed"):
        compare(profile_of(0), profile_of(1, 19))


def test_new_and_vanished_classes() -> None:
    before = profile_of(0, classes={"a": 60, "b": 57, "c": 3})
    drift = compare(before, profile_of(1, classes={"a": 115, "b": 0, "d": 5}))
    assert drift.new_classes == {"d": 5} and drift.vanished == {"b": 57}, "that c is missing may be chance"
    assert levels(drift)["new classes"] == "warn" and levels(drift)["vanished classes"] == "warn"
    assert levels(compare(before, profile_of(1, classes={"a": 60, "b": 50, "d": 10})))["new classes"] == "stop"
    known = compare(profile_of(0, classes={"a": 120, "b": 0}), profile_of(1, classes={"a": 119, "b": 1}))
    assert known.new_classes == {}, "the bundle knows it, though the reference has none"


def test_without_labels_or_features_the_rest_is_compared() -> None:
    drift = compare(profile_of(0), profile_of(1, features=None, classes=None))
    assert [check.name for check in drift.checks] == ["answers", "confidence", "brightness"]
    assert drift.distances is None and drift.far is None and drift.furthest(5) == []
    assert "brightness" not in [c.name for c in compare(profile_of(0), profile_of(1, statistics={})).checks]
    missing = {"brightness": np.full(120, np.nan, np.float32)}
    assert "brightness" not in [c.name for c in compare(profile_of(0), profile_of(1, statistics=missing)).checks]


def test_of_several_labels_each_is_compared_as_given_or_not() -> None:
    one, same = (profile_of(i, multilabel=True, answered=np.array([100, 60, 5]), classes=None) for i in range(2))
    assert compare(one, same).level == "none"
    drift = compare(one, profile_of(1, multilabel=True, answered=np.array([100, 60, 60]), classes=None))
    assert levels(drift) == {"answers": "stop"}
    halved = compare(one, profile_of(1, multilabel=True, answered=np.array([50, 30, 3]), classes=None))
    assert levels(halved) == {"answers": "stop"}, "although their fractions of all labels are unchanged"


def test_thresholds_decide_and_mistakes_are_named() -> None:
    pair = profile_of(0), profile_of(1, features=profile_of(1).features + 0.45)
    assert levels(compare(*pair)) == {"features": "warn"}
    assert levels(compare(*pair, thresholds=parse_thresholds({"features": {"stop": 0.021}}))) == {"features": "stop"}
    assert compare(*pair, thresholds=parse_thresholds({"features": {"warn": None, "stop": None}})).level == "none"
    assert parse_thresholds({"width": {"stop": 1}})["width"] == Threshold(0.1, 1) and THRESHOLDS["width"].stop is None
    for mistake, said in (
        ({"featrues": {}}, "did you mean 'features'"),
        ({"width": {"halt": 1}}, "expected `warn` and `stop`"),
        ({"width": {"warn": "x"}}, "width.warn: 'x'"),
        ({"width": {"warn": -1}}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_thresholds(mistake)


def test_the_furthest_are_those_from_elsewhere() -> None:
    new = profile_of(1)
    new.features[[3, 50]] += 9
    drift = compare(profile_of(0), new)
    assert set(drift.furthest(2)) == {3, 50} and drift.far < 0.1
    distances, usual = far_from(profile_of(0).features, profile_of(0).features)
    assert (distances <= usual).mean() > 0.98


def test_profiles_travel_and_what_is_none_is_refused() -> None:
    profile = profile_of(0)
    again = Profile.from_bytes(profile.to_bytes(), LABELS, multilabel=False)
    assert np.allclose(again.features, profile.features, atol=0.01) and again.classes == profile.classes
    assert np.array_equal(again.answered, profile.answered) and np.array_equal(again.confidence, profile.confidence)
    assert np.array_equal(again.statistics["brightness"], profile.statistics["brightness"]) and again.count == 120
    large = profile_of(0, features=profile.features * 1e6)
    assert np.allclose(
        Profile.from_bytes(large.to_bytes(), LABELS, multilabel=False).features / 1e6, profile.features, atol=0.01
    )
    with pytest.raises(ValueError, match="does not fit its labels"):
        Profile.from_bytes(profile.to_bytes(), ("a", "b"), multilabel=False)
    with pytest.raises(ValueError, match="is not a profile"):
        Profile.from_bytes(b"nothing", LABELS, multilabel=False)


def test_many_features_are_folded_to_few_with_their_distances() -> None:
    rng = np.random.default_rng(0)
    wide = (rng.random((20, 5000)) * np.arange(1, 21)[:, None]).astype(np.float32)  # as after a ReLU: none is negative
    small = folded(wide)
    assert small.shape == (20, WIDEST) and np.array_equal(folded(wide[:3]), small[:3])
    before, after = (np.linalg.norm(rows[:1] - rows[1:], axis=1) for rows in (wide, small))
    assert np.allclose(before, after, rtol=0.15)
    assert np.array_equal(folded(wide[:, :WIDEST]), wide[:, :WIDEST])


def test_of_many_rows_a_part_is_taken() -> None:
    x = np.random.default_rng(0).normal(size=(2 * MOST, 4))
    x[:, 0] = np.arange(2 * MOST)
    assert len(at_most(x, MOST, np.random.default_rng(1))) == MOST
    tracemalloc.start()
    assert mmd(x, x + 5, permutations=20).p <= 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 * (2 * MOST) ** 2 * 4, "nine kernels of 2,000 rows, not of 4,000"
