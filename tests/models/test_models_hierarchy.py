"""The class hierarchy: probabilities of inner nodes, predictions that back off, and names that form no hierarchy."""

import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refract.models.bundle.info import BundleError, BundleInfo
from refract.models.hierarchy import NO_NODE, BackOff, Hierarchy, HierarchyError
from refract.models.prediction import prediction

LABELS = ("bee", "cat", "dog", "pine", "rose")
PARENTS = {
    "bee": "animal", "cat": "mammal", "dog": "mammal", "mammal": "animal", "animal": None, "pine": "plant", "rose": "plant", "plant": None,
}  # fmt: skip
ANIMALS = Hierarchy(LABELS, PARENTS)

INFO = BundleInfo(
    name="life", task="multiclass", labels=LABELS, network={"name": "lenet5", "image_size": [32, 32], "args": {}},
    preprocess={"mean": [0.5] * 3, "std": [0.2] * 3}, created="2026-11-05T03:00:00+00:00",
)  # fmt: skip


@st.composite
def hierarchies(draw) -> Hierarchy:
    """Forests of 3 to 9 classes and up to 6 inner nodes: the parent of an inner node is an earlier one."""
    labels = tuple(f"class {i}" for i in range(draw(st.integers(3, 9))))
    count = draw(st.integers(1, 6))
    parents = {f"inner {i}": draw(st.sampled_from([None, *(f"inner {j}" for j in range(i))])) for i in range(count)}
    parents |= {label: draw(st.sampled_from([None, *parents])) for label in labels}
    used, above = set(), [parents[label] for label in labels]
    while above:
        if (name := above.pop()) is not None:
            used.add(name)
            above.append(parents[name])
    try:
        return Hierarchy(labels, {name: parent for name, parent in parents.items() if name in labels or name in used})
    except HierarchyError as error:
        assert "nothing to back off to" in str(error)
        assume(False)
        raise


@st.composite
def scored(draw) -> tuple[Hierarchy, np.ndarray]:
    """(a hierarchy, float32 probabilities of some samples)"""
    hierarchy = draw(hierarchies())
    seed, sharpness = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.3, 2.0, 30.0]))
    logits = np.random.default_rng(seed).normal(0, sharpness, (draw(st.integers(1, 12)), len(hierarchy.labels)))
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hierarchy, (rows / rows.sum(axis=1, keepdims=True)).astype(np.float32)


def members(hierarchy: Hierarchy) -> np.ndarray:
    """(nodes, C) bool: whether a class is below a node."""
    return np.array([[name in hierarchy.path(label) for label in hierarchy.labels] for name in hierarchy.nodes])


@given(hierarchies())
def test_sizes_heights_and_members_agree_with_the_paths(hierarchy: Hierarchy) -> None:
    below, count = members(hierarchy), len(hierarchy.labels)
    assert hierarchy.sizes.tolist() == below.sum(axis=1).tolist()
    for row, level, height in zip(below, hierarchy.levels, hierarchy.heights, strict=True):
        assert height == max(hierarchy.levels[:count][row]) - level
    nodes, classes = np.indices(below.shape).reshape(2, -1)
    assert (hierarchy.contains(nodes, classes) == below.ravel()).all()
    assert not hierarchy.contains(np.full(count, NO_NODE), np.arange(count)).any()


def test_the_memory_grows_with_the_classes_and_not_with_their_square() -> None:
    labels = tuple(map(str, range(4000)))
    parents = {label: f"group {number // 4}" for number, label in enumerate(labels)}
    parents |= dict.fromkeys(sorted(set(parents.values())))
    rows = np.full((3, 4000), 1e-5)
    rows[np.arange(3), np.arange(3)] = 0.5
    tracemalloc.start()
    hierarchy = Hierarchy(labels, parents)
    hierarchy.common_heights(np.arange(10), np.arange(10)[::-1])
    assert hierarchy.contains(hierarchy.answers(rows, 0.9, 0.4), np.arange(3)).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, "a matrix of nodes and classes has 20 MB"


@given(scored())
def test_a_node_is_as_probable_as_its_classes_and_never_less_than_a_node_below_it(case) -> None:
    hierarchy, rows = case
    values = hierarchy.probabilities(rows)
    np.testing.assert_allclose(values, rows.astype(float) @ members(hierarchy).T, atol=1e-6)
    assert (values[:, : len(hierarchy.labels)] == rows).all() and values.max() <= 1
    for node, name in enumerate(hierarchy.nodes):
        path = [hierarchy.nodes.index(above) for above in hierarchy.path(name)]
        assert (
            path[-1] == node
            and hierarchy.levels[node] == len(path)
            and hierarchy.parents[hierarchy.path(name)[0]] is None
        )
        assert (np.diff(values[:, path], axis=1) <= 0).all()


@given(scored(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_the_predicted_node_is_the_most_specific_that_reaches_its_threshold(
    case, below: float, threshold: float, exact: bool
) -> None:
    hierarchy, rows = case
    values, sizes, count = hierarchy.probabilities(rows), members(hierarchy).sum(axis=1), len(hierarchy.labels)
    if exact:  # one of the probabilities
        below, threshold = (np.sort(values.ravel())[int(share * (values.size - 1))] for share in (below, threshold))
    nodes = hierarchy.answers(rows, below, threshold)
    for row, node, back_off in zip(values, nodes.tolist(), hierarchy.back_offs(rows, below, threshold), strict=True):
        groups = [i for i in range(count, len(row)) if row[i] >= threshold and 1 < sizes[i] < count and threshold < 1]
        if row[:count].max() >= below and below < 1:
            assert node == row[:count].argmax() and back_off is None
        elif groups:
            best = min(groups, key=lambda i: (sizes[i], -row[i]))
            assert row[node] >= threshold and (sizes[node], row[node]) == (sizes[best], row[best])
            assert back_off == BackOff(hierarchy.nodes[node], row[node], hierarchy.levels[node])
        else:
            assert node == NO_NODE and back_off is None


def test_the_prediction_backs_off_to_the_parent_and_abstains_where_no_class_is_certain() -> None:
    rows = np.array([
        [0, 0.9, 0.1, 0, 0],     # cat
        [0, 0.5, 0.4, 0.1, 0],   # a mammal
        [0.4, 0.3, 0.2, 0.1, 0], # an animal
        [0.3, 0.1, 0.1, 0.3, 0.2],
        [0.36, 0, 0, 0.33, 0.31], # bee is the most probable class, but it is more probably a plant
    ], np.float32)  # fmt: skip
    back_offs = ANIMALS.back_offs(rows, 0.8, 0.6)
    assert [back_off and (back_off.label, back_off.level) for back_off in back_offs] == [
        None, ("mammal", 2), ("animal", 1), None, ("plant", 1)
    ]  # fmt: skip
    answers = [
        prediction(row, LABELS, top=2, thresholds=None, abstain_below=0.8, backed_off=back_off)
        for row, back_off in zip(rows, back_offs, strict=True)
    ]
    assert [answer["abstain"] for answer in answers] == [False, True, True, True, True], "as without a hierarchy"
    assert all(answer["abstain_reasons"] == ["low_confidence"] for answer in answers[1:])
    assert answers[1]["label"] == "cat" and answers[1]["backed_off"] == {
        "label": "mammal", "confidence": pytest.approx(0.9), "level": 2
    }  # fmt: skip
    assert "backed_off" not in answers[3]
    assert ANIMALS.back_offs(rows, None, 0.6) == ANIMALS.back_offs(rows, 0.8, None) == [None] * 5
    assert ANIMALS.answers(np.eye(5), 1.0, 1.0).tolist() == [NO_NODE] * 5, "a threshold of 1 accepts nothing"
    assert [back_off is not None for back_off in ANIMALS.back_offs(rows, 1.0, 0.6)] == [True, True, True, False, True]
    unfamiliar = prediction(
        rows[1], LABELS, top=1, thresholds=None, abstain_below=0.8, backed_off=back_offs[1], min_familiarity=0.1
    )
    assert (
        unfamiliar["abstain_reasons"] == ["low_confidence", "unfamiliar"]
        and unfamiliar["backed_off"]["label"] == "mammal"
    )


def test_a_root_of_all_classes_and_a_parent_of_one_class_are_never_predicted() -> None:
    parents = {**PARENTS, "animal": "thing", "plant": "thing", "thing": None, "bee": "insect", "insect": "animal"}
    hierarchy = Hierarchy(LABELS, parents)
    assert [hierarchy.nodes[node] for node in hierarchy.groups] == ["mammal", "animal", "plant"]
    rows = np.array([[0.4, 0.1, 0.1, 0.2, 0.2]], np.float32)
    assert (
        hierarchy.answers(rows, 0.9, 0.61)[0] == NO_NODE
        and hierarchy.probabilities(rows)[0, hierarchy.nodes.index("thing")] == 1
    )


def test_the_height_of_the_common_ancestor() -> None:
    pairs = {("cat", "cat"): 0, ("cat", "dog"): 1, ("bee", "dog"): 2, ("pine", "rose"): 1, ("cat", "rose"): 3}
    one, other = (np.array([LABELS.index(pair[k]) for pair in pairs]) for k in (0, 1))
    assert ANIMALS.common_heights(one, other).tolist() == list(pairs.values())
    assert ANIMALS.common_heights(other, one).tolist() == list(pairs.values())


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"mammal": "cat"}, "mammal", "the parent 'cat' of 'mammal' is a class of the data"),
        ({"animal": "mammal"}, "animal", "form a cycle: animal → mammal → animal"),
        ({"animal": "animal"}, "animal", "form a cycle: animal → animal"),
        ({"x": "y", "y": "z", "z": "y"}, "y", "form a cycle: y → z → y"),
        ({"ros": "plant"}, "ros", "'ros' is neither a class of the data nor a parent of one; did you mean 'rose'"),
        ({"fungus": None}, "fungus", "'fungus' is neither a class of the data nor a parent of one; the classes are bee, cat"),
        ({"rose": "flower"}, "rose", "the parent 'flower' of 'rose' has no entry"),
        (dict.fromkeys(PARENTS), "mammal", "'mammal' is neither a class"),
    ],
)  # fmt: skip
def test_names_that_form_no_hierarchy_are_refused(changes: dict[str, str | None], name: str, reason: str) -> None:
    with pytest.raises(HierarchyError, match=reason) as caught:
        Hierarchy(LABELS, PARENTS | changes)
    assert caught.value.name == name
    with pytest.raises(BundleError, match=f"field 'hierarchy.parents': .*{reason}"):
        replace(INFO, hierarchy={"parents": PARENTS | changes, "threshold": 0.5})


def test_a_hierarchy_that_groups_nothing_is_refused() -> None:
    for parents in (dict.fromkeys(LABELS), {**dict.fromkeys(LABELS, "thing"), "thing": None}):
        with pytest.raises(HierarchyError, match="nothing to back off to"):
            Hierarchy(LABELS, parents)


def test_a_bundle_keeps_its_hierarchy_and_older_bundles_have_none() -> None:
    info = replace(INFO, abstain_below=0.8, hierarchy={"parents": PARENTS, "threshold": 0.6})
    again = BundleInfo.from_json(info.to_json())
    assert again == info and again.tree == ANIMALS and pickle.loads(pickle.dumps(again)).tree == ANIMALS
    assert "hierarchy" not in INFO.to_dict() and BundleInfo.from_dict(INFO.to_dict()).tree is None
    assert INFO.back_offs(np.ones((2, 5))) == [None, None]
    assert [node and node.label for node in info.back_offs(np.array([[0, 0.5, 0.4, 0.1, 0]]))] == ["mammal"]
    for wrong in ({}, {"bee": 3}, [], {**PARENTS, "bee": ""}):
        with pytest.raises(BundleError, match="hierarchy"):
            BundleInfo.from_dict({**info.to_dict(), "hierarchy": {"parents": wrong, "threshold": 0.5}})
    for wrong in ({"parents": PARENTS}, {"parents": PARENTS, "threshold": 2}, []):
        with pytest.raises(BundleError, match="hierarchy"):
            BundleInfo.from_dict({**info.to_dict(), "hierarchy": wrong})
    with pytest.raises(BundleError, match="'hierarchy'.* none for the task multilabel"):
        replace(info, task="multilabel", thresholds=(0.5,) * 5)
