"""Amaranth layouts of the contract's records."""

from amaranth import Cat, Const, Value, unsigned
from amaranth.lib import data

from prestage_hw.contract import RECORDS
from prestage_hw.contract.params import require_config

__all__ = ["RecordLayout", "body_bytes", "body_fields"]


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
        require_config(config)
        fields = {}
        for field in RECORDS[name].fields:
            shape = unsigned(field.bits(config))
            if field.count is not None:
                shape = data.ArrayLayout(shape, field.length(config))
            fields[field.name] = shape
        super().__init__(fields)


def body_fields(name, *, config, body):
    """Fields of a record in a message body.

    Parameters
    ----------
    name : :class:`str`
        Name of the record.
    config : :class:`DeviceConfig`
        Device whose widths apply.
    body : array of 8-bit values
        Body in wire order.

    Returns
    -------
    dict
        For each field its value as wide as on the wire; a list of values for an array.
    """
    fields = {}
    at = 0
    for field in RECORDS[name].fields:
        size = field.wire_bits // 8
        values = []
        for _ in range(field.length(config)):
            values.append(Cat(body[at + i] for i in range(size)))
            at += size
        fields[field.name] = values[0] if field.count is None else values
    return fields


def body_bytes(name, *, config, **values):
    """Bytes of a message body, in wire order.

    Parameters
    ----------
    name : :class:`str`
        Name of the record.
    config : :class:`DeviceConfig`
        Device whose widths apply.
    values
        For each field a value, or a sequence of values for an array.

    Returns
    -------
    list of 8-bit values
    """
    result = []
    for field in RECORDS[name].fields:
        value = values.pop(field.name)
        elements = [value] if field.count is None else list(value)
        for element in elements:
            wide = Cat(Value.cast(element), Const(0, field.wire_bits))[: field.wire_bits]
            result.extend(wide[at : at + 8] for at in range(0, field.wire_bits, 8))
    if values:
        raise ValueError(f"{name} has no field {', '.join(values)}")
    return result
