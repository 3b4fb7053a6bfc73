"""The contract: shapes, records, registers and wire format, in plain Python.

Everything that two sides must agree on is written here once. RTL layouts, NumPy dtypes, wire bytes,
the C header and the register page are derived from it. Nothing here imports Amaranth.
"""

from .params import PRESETS, DeviceConfig, ModelConfig, Rows, preset
from .pipe import TRANSFER_DTYPE, Pipe, SimulatedPipe
from .records import MESSAGES, RECORDS, Field, Message, Record, message_by_code
from .registers import REGISTERS, Register, register_by_name, register_hash
from .wire import WireError, decode_frame, encode_frame

__all__ = [
    "MESSAGES",
    "PRESETS",
    "RECORDS",
    "REGISTERS",
    "TRANSFER_DTYPE",
    "DeviceConfig",
    "Field",
    "Message",
    "ModelConfig",
    "Pipe",
    "Record",
    "Register",
    "Rows",
    "SimulatedPipe",
    "WireError",
    "decode_frame",
    "encode_frame",
    "message_by_code",
    "preset",
    "register_by_name",
    "register_hash",
]
