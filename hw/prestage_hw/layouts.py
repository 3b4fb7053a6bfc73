"""Amaranth layouts of the contract's records."""

from amaranth import unsigned
from amaranth.lib import data

from prestage_hw.contract import RECORDS, DeviceConfig

__all__ = ["RecordLayout"]


class RecordLayout(data.StructLayout):
    """Layout of one record of the contract.

    Parameters
    ----------
    name : :class:`str`
        Name of the record in :data:`prestage_hw.contract.RECORDS`.
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Raises
    ------
    ValueError
        If no record has that name.
    """

    def __init__(self, name, *, config):
        if name not in RECORDS:
            raise ValueError(f"Record must be one of {', '.join(RECORDS)}, not {name!r}")
        if not isinstance(config, DeviceConfig):
            raise TypeError(f"Configuration must be a DeviceConfig, not {config!r}")
        fields = {}
        for field in RECORDS[name].fields:
            shape = unsigned(field.bits(config))
            if field.count is not None:
                shape = data.ArrayLayout(shape, field.length(config))
            fields[field.name] = shape
        super().__init__(fields)
