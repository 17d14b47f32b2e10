"""What a review's page reads, as JSON: items of a queue, the state of an item, and the measurements of the session."""

from refract.pipeline.labels.decisions import Record
from refract.pipeline.review.items import Entry, Item, Queue
from refract.pipeline.review.session import Decided, ItemState, ReviewSession


def session_view(session: ReviewSession, reviewer: str, *, fixed: bool) -> dict[str, object]:
    """Describe the session for a reviewer. fixed: whether an API key decides the reviewer's name."""
    audit, agreement = session.audit(), session.agreement()
    return {
        "title": session.title,
        "labels": list(session.labels),
        "ancestors": {label: list(nodes) for label in session.labels if (nodes := session.ancestors(label))},
        "multilabel": session.multilabel,
        "reviewer": {"name": reviewer, "fixed": fixed},
        "queues": [_queue_view(session, queue, reviewer) for queue in session.queues],
        "audit": audit and {name: getattr(audit, name) for name in ("decided", "wrong", "rate", "low", "high")},
        "agreement": agreement and {name: getattr(agreement, name) for name in ("images", "agreed", "kappa")},
    }


def _queue_view(session: ReviewSession, queue: Queue, reviewer: str) -> dict[str, object]:
    count = session.open_count(queue.name, reviewer)
    return {
        "name": queue.name,
        "title": queue.title,
        "description": queue.description,
        "total": max(len(queue.entries), count),  # conflicts arise during the review
        "open": count,
    }


def entry_view(session: ReviewSession, entry: Entry, queue: str) -> dict[str, object]:
    """Describe an entry of a queue and its item."""
    related = None if entry.related is None else brief_view(session.items[entry.related])
    view = item_view(session, session.items[entry.item])
    return view | {
        "labels": list(session.given(entry.item, queue)),
        "reason": entry.reason,
        "score": entry.score,
        "related": related,
    }


def item_view(session: ReviewSession, item: Item) -> dict[str, object]:
    """Describe an item and the decision that applies to it."""
    return brief_view(item) | {
        "in_data": session.in_data(item.index),
        "content": item.content,
        "predictions": [{"label": one.label, "probability": one.probability} for one in item.predictions],
        "familiarity": item.familiarity,
        "state": state_view(session.state(item.index)),
    }


def brief_view(item: Item) -> dict[str, object]:
    """Describe an item that is shown next to another."""
    return {"index": item.index, "path": item.path, "labels": list(item.labels), "split": item.split}


def state_view(state: ItemState) -> dict[str, object]:
    """Describe the decision that applies to an item, and those in conflict with it."""
    return {
        "applied": None if state.applied is None else _decision(state.applied),
        "seen": state.seen,
        "conflicts": [_decision(record) for record in state.conflicts],
    }


def _decision(record: Record) -> dict[str, object]:
    return {"record": record.id, "action": record.action, "labels": list(record.labels), "reviewer": record.reviewer}


def decided_view(decided: Decided) -> dict[str, object]:
    """Describe an earlier decision of a reviewer."""
    return {
        "record": decided.record,
        "item": decided.item,
        "action": decided.action,
        "labels": list(decided.labels),
        "queue": decided.queue,
    }
