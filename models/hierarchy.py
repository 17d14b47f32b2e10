"""The class hierarchy: a forest whose leaves are the classes, and predictions that back off to an ancestor. Imports NumPy alone.

The probability of an inner node is the sum over its classes. Where no class is certain enough, the prediction backs off to the most
specific node whose probability reaches a threshold: Valmadre 2022, "Hierarchical classification at multiple operating points",
arXiv:2210.10929. The trade-off of accuracy and specificity is that of Deng et al. 2012, "Hedging your bets", CVPR. Deviations: classes have
a separate threshold, so that a hierarchy takes no class away, and a node of all classes is never predicted, as it says nothing about the
sample.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

NO_NODE = -1
"""The index that `Hierarchy.answers` returns where no node reaches the threshold."""


class HierarchyError(ValueError):
    """Raised for names that form no hierarchy of the classes. name: the node at fault, None if it is the hierarchy as a whole."""

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


class BackOff(NamedTuple):
    """The ancestor that is certain enough where no class is. level: 1 for a root, 2 for its children, and so on."""

    label: str
    confidence: float
    level: int

    @property
    def fields(self) -> dict[str, Any]:
        """The node as JSON values."""
        return self._asdict()


@dataclass(frozen=True)
class Hierarchy:
    """A forest whose leaves are the classes.

    labels: the classes, in the order of the logits; parents: name → parent, None for a root, for each class and each inner node.
    A node is numbered by its index in `nodes`, so that a class has the index of its logit. Raises HierarchyError for a cycle, a parent that
    is a class or that has no entry, a class without an entry, an inner node without classes, and a hierarchy that groups no classes.
    """

    labels: tuple[str, ...]
    parents: Mapping[str, str | None]

    def __post_init__(self) -> None:
        _check(self.labels, self.parents)
        if not len(self.groups):
            raise HierarchyError(
                "no parent has several classes but not all of them, so there is nothing to back off to"
            )

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The names of all nodes: the classes, then the inner nodes."""
        classes = set(self.labels)
        return (*self.labels, *(name for name in self.parents if name not in classes))

    @cached_property
    def levels(self) -> np.ndarray:
        """(nodes,) the level of each node: 1 for a root, 2 for its children, and so on."""
        return np.array([len(self.path(name)) for name in self.nodes])

    @cached_property
    def lineage(self) -> np.ndarray:
        """(C, deepest level) the node of each class at the levels 1, 2 and so on; the class itself at its own level and below."""
        index = {name: i for i, name in enumerate(self.nodes)}
        count = len(self.labels)
        rows = np.repeat(np.arange(count)[:, None], int(self.levels[:count].max()), axis=1)
        for row, label in zip(rows, self.labels, strict=True):
            path = self.path(label)
            row[: len(path)] = [index[name] for name in path]
        return rows

    @cached_property
    def sizes(self) -> np.ndarray:
        """(nodes,) the number of classes below each node; 1 for a class."""
        own_level = self.levels[: len(self.labels), None] > np.arange(self.lineage.shape[1])
        return np.bincount(self.lineage[own_level], minlength=len(self.nodes))

    @cached_property
    def heights(self) -> np.ndarray:
        """(nodes,) the number of edges from each node to the deepest class below it; 0 for a class."""
        deepest = np.zeros(len(self.nodes), int)
        np.maximum.at(deepest, self.lineage, self.levels[: len(self.labels), None])
        return deepest - self.levels

    @cached_property
    def groups(self) -> np.ndarray:
        """The inner nodes that may be predicted: those with at least two classes but not all, the deepest first."""
        candidates = np.flatnonzero((self.sizes > 1) & (self.sizes < len(self.labels)))
        return candidates[np.argsort(-self.levels[candidates], kind="stable")]

    def path(self, name: str) -> tuple[str, ...]:
        """Return the names from the root down to a node."""
        names = [name]
        while (parent := self.parents[names[-1]]) is not None:
            names.append(parent)
        return tuple(reversed(names))

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """Return the probability of each node, float64 (N, nodes). rows: (N, C) probabilities of the classes.

        No node is less probable than a node below it, also after rounding: each sum is one of the children, which are not negative.
        """
        values = np.zeros((len(rows), len(self.nodes)))
        values[:, : len(self.labels)] = rows
        for children, starts, parents in self._sums:
            values[:, parents] = np.add.reduceat(values[:, children], starts, axis=1)
        return np.minimum(values, 1)

    def answers(self, rows: np.ndarray, class_threshold: float, threshold: float) -> np.ndarray:
        """Return the predicted node of each row, (N,), NO_NODE for none. rows: (N, C) probabilities of the classes.

        It is the most probable class if that reaches `class_threshold`; else, of the `groups` that reach `threshold`, the one with the
        fewest classes, and of those the most probable. A threshold of 1 accepts nothing, as for predictions without a hierarchy.
        """
        rows = np.asarray(rows, np.float64)
        accepted = (rows.max(axis=1) >= class_threshold) & (class_threshold < 1)
        chosen = np.where(accepted, rows.argmax(axis=1), NO_NODE)
        unsure = np.flatnonzero(~accepted)
        if threshold >= 1 or not len(unsure):
            return chosen
        values = self.probabilities(rows[unsure])[:, self.groups]
        sizes = np.where(values >= threshold, self.sizes[self.groups], np.inf)
        fewest = sizes.min(axis=1)
        best = np.where(sizes == fewest[:, None], values, -1).argmax(axis=1)
        chosen[unsure] = np.where(np.isfinite(fewest), self.groups[best], NO_NODE)
        return chosen

    def back_offs(
        self, rows: np.ndarray, class_threshold: float | None, threshold: float | None
    ) -> list[BackOff | None]:
        """Return, for each row, the ancestor that is certain enough where no class is, see `answers`.

        None where the class reaches its threshold, where no group reaches the other one, and without a threshold.
        """
        result: list[BackOff | None] = [None] * len(rows)
        if class_threshold is None or threshold is None:
            return result
        answers = self.answers(rows, class_threshold, threshold)
        backed_off = np.flatnonzero(answers >= len(self.labels))
        values = self.probabilities(rows[backed_off])
        for row, node, value in zip(backed_off.tolist(), answers[backed_off].tolist(), values, strict=True):
            result[row] = BackOff(self.nodes[node], float(value[node]), int(self.levels[node]))
        return result

    def contains(self, nodes: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Return whether each class is below the node, (N,) bool; a class is below itself, and none below NO_NODE. Both: (N,) indices."""
        return (self.lineage[classes] == nodes[:, None]).any(axis=1)

    def common_heights(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return the height of the lowest common ancestor of two classes, (N,). one, other: (N,) class indices.

        Classes of different trees meet one edge above the highest root.
        """
        first, second = self.lineage[one], self.lineage[other]
        common = (first == second).sum(axis=1)  # equal at the first levels, and then never again
        deepest = first[np.arange(len(first)), np.maximum(common, 1) - 1]
        return np.where(common > 0, self.heights[deepest], 1 + self.heights.max())

    @cached_property
    def _sums(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The sums that give the probabilities, one for each level, the deepest first: (children by parent, the first child of each parent
        in that order, parents). All children of a node have one level."""
        index = {name: i for i, name in enumerate(self.nodes)}
        edges = sorted(
            (-int(self.levels[index[name]]), index[parent], index[name])
            for name, parent in self.parents.items()
            if parent is not None
        )
        sums = []
        for _, level in groupby(edges, key=lambda edge: edge[0]):
            of_level = np.array([(parent, child) for _, parent, child in level])
            parents, starts = np.unique(of_level[:, 0], return_index=True)
            sums.append((of_level[:, 1], starts, parents))
        return sums


def _check(labels: Sequence[str], parents: Mapping[str, str | None]) -> None:
    """Raise HierarchyError as `Hierarchy`."""
    classes = set(labels)
    for label in labels:
        if label not in parents:
            raise HierarchyError(f"the class {label!r} has no entry", label)
    for name, parent in parents.items():
        if parent in classes:
            raise HierarchyError(
                f"the parent {parent!r} of {name!r} is a class of the data, and a class has no nodes below it; name the parent differently",
                name,
            )
        if parent is not None and parent not in parents:
            raise HierarchyError(f"the parent {parent!r} of {name!r} has no entry", name)
    above = _ancestors(labels, parents)
    for name in parents:
        if name not in classes and name not in above:
            path = _path_or_cycle(name, parents)
            if (start := path.index(path[-1])) < len(path) - 1:
                raise HierarchyError(f"the parents of {path[-1]!r} form a cycle: {' → '.join(path[start:])}", path[-1])
            near = difflib.get_close_matches(name, labels, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the classes are {', '.join(labels[:10])}"
            raise HierarchyError(f"{name!r} is neither a class of the data nor a parent of one; {hint}", name)


def _ancestors(labels: Sequence[str], parents: Mapping[str, str | None]) -> set[str]:
    """Return all nodes above the classes. HierarchyError for a cycle."""
    above: set[str] = set()
    for label in labels:
        path, parent = [label], parents[label]
        while parent is not None and parent not in above:
            if parent in path:
                cycle = path[path.index(parent) :]
                raise HierarchyError(f"the parents of {parent!r} form a cycle: {' → '.join([*cycle, parent])}", parent)
            path.append(parent)
            parent = parents[parent]
        above.update(path[1:])
    return above


def _path_or_cycle(name: str, parents: Mapping[str, str | None]) -> list[str]:
    """Return the names from a node up to its root, or up to its second occurrence."""
    path, parent = [name], parents[name]
    while parent is not None and parent not in path:
        path.append(parent)
        parent = parents[parent]
    return path if parent is None else [*path, parent]
