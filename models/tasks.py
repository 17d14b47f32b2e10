"""The kinds of classification. Imports no PyTorch."""

import difflib

SINGLE_LABEL = ("binary", "multiclass")
"""The tasks with one label for each sample."""

TASKS = (*SINGLE_LABEL, "multilabel")


def check_task(task: str) -> None:
    """Raise ValueError if `task` is not one of TASKS. The message lists the tasks and the nearest name."""
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"task={task!r}: expected one of {', '.join(TASKS)}{hint}")
