"""Which expert is in which slot, what each slot holds, and what each context has pinned."""

from __future__ import annotations

from prestage_hw.contract import DeviceConfig

__all__ = ["EMPTY", "FILLING", "READY", "Directory", "SlotState"]

EMPTY, FILLING, READY = 0, 1, 2


class SlotState:
    """What a slot holds.

    Attributes
    ----------
    owner : :class:`int`
        Key of the expert, see :meth:`Directory.key`; -1 for none.
    filling : :class:`bool`
        Whether a transfer into the slot is in flight.
    prefetched : :class:`bool`
        Whether the expert came by a prefetch and was not demanded since.
    pins : :class:`int`
        Contexts that hold the slot.
    locked : :class:`bool`
        Whether the expert stays until it is unlocked.
    value, mark : :class:`int`
        Of a prefetch: its confidence, and the visits of its layer at that time.
    held : :class:`bool`
        Whether it is a copy, or an expert that is held for the sake of its copies.
    copy : :class:`int`
        Number of the copy, 0 for the expert itself.
    links : dict of :class:`int` to :class:`int`
        Slot of each copy of the expert that is here itself.
    """

    __slots__ = (
        *("copy", "filling", "held", "links", "locked", "mark", "owner", "pins", "prefetched"),
        "value",
    )

    def __init__(self) -> None:
        self.owner = -1
        self.filling = False
        self.prefetched = False
        self.pins = 0
        self.locked = False
        self.value = 0
        self.mark = 0
        self.held = False
        self.copy = 0
        self.links: dict[int, int] = {}


class Directory:
    """The state of every expert and of every slot, and the pin lists.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts, slots and contexts are listed.

    Attributes
    ----------
    state : list of :class:`int`
        ``EMPTY``, ``FILLING`` or ``READY`` of each expert, by key.
    slot_of : list of :class:`int`
        Slot of each expert that is not empty, by key.
    evicted_by_prefetch : set of :class:`int`
        Keys of the experts that a prefetch evicted, until they are allocated again.
    slots : list of :class:`SlotState`
        State of each slot.
    pins : dict of (:class:`int`, :class:`int`) to dict
        For each context and layer: the slot pinned at each index.
    """

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        experts = self.config.model.layers * self.config.model.experts
        self.state = [EMPTY] * experts
        self.slot_of = [0] * experts
        self.evicted_by_prefetch: set[int] = set()
        self.slots = [SlotState() for _ in range(self.config.slots)]
        self.pins: dict[tuple[int, int], dict[int, int]] = {}

    def key(self, layer: int, expert: int) -> int:
        """Number of an expert among those of all layers.

        Raises
        ------
        ValueError
            If the layer or the expert is out of range.
        """
        model = self.config.model
        if not 0 <= layer < model.layers:
            raise ValueError(f"Layer must be between 0 and {model.layers - 1}, not {layer}")
        if not 0 <= expert < model.experts:
            raise ValueError(f"Expert must be between 0 and {model.experts - 1}, not {expert}")
        return layer * model.experts + expert
