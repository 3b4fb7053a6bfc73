"""Events of a run as a Chrome trace, for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .events import EventKind

if TYPE_CHECKING:
    from .report import Timeline

__all__ = ["chrome_trace"]

#: Rows of the trace: who does something.
_COMPUTE, _LINKS = 1, 100

_NAMES = {
    EventKind.ATTENTION: "attention and gate",
    EventKind.COMPUTE: "expert",
    EventKind.DEMAND_TILE: "demand",
    EventKind.PREFETCH_TILE: "prefetch",
    EventKind.STALL: "stall",
    EventKind.EVICT: "evict",
    EventKind.CANCEL: "cancel",
    EventKind.DRAFT: "draft",
}


def chrome_trace(timeline: Timeline) -> str:
    """Events in the JSON format of Chrome traces; a microsecond is a microsecond simulated.

    Parameters
    ----------
    timeline : :class:`Timeline`
        Events of some tokens of a cell.
    """
    result = timeline.outcome.result
    machine = timeline.outcome.cell.machine
    rows = {_COMPUTE: "compute"}
    for number, (tier, _) in enumerate(machine.ways):
        rows[_LINKS + number] = f"from {machine.tiers[tier].name}" if tier else f"link {number}"
    name = f"{result.policy} on {result.machine}, {100 * result.residency:g} % resident"
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": name}},
        *(
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": text}}
            for row, text in rows.items()
        ),
    ]
    for event in timeline.events:
        about = {"token": event.token - timeline.replayed, "layer": event.layer}
        text = _NAMES[EventKind(event.kind)]
        if event.expert >= 0:
            about["expert"] = event.expert
            text = f"{text} {event.layer}:{event.expert}"
        one: dict[str, Any] = {
            "name": text,
            "cat": EventKind(event.kind).name.lower(),
            "pid": 1,
            "tid": _LINKS + event.link if event.link >= 0 else _COMPUTE,
            "ts": 1e6 * event.start,
            "args": about,
        }
        if event.kind in (EventKind.EVICT, EventKind.CANCEL):
            one |= {"ph": "i", "s": "t"}
        else:
            one |= {"ph": "X", "dur": 1e6 * (event.end - event.start)}
        events.append(one)
    events.sort(key=lambda one: one.get("ts", -1.0))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})
