"""Host driver of Prestage devices.

>>> import prestage
>>> from prestage_hw.contract import DeviceConfig, preset
>>> config = DeviceConfig(model=preset("tiny"), slots=8, expert_bytes=1024)
>>> with prestage.open("model://", config=config) as device:
...     device.begin_token(0)
...     device.route(0, 0, [3, 5])
...     arrived = sorted(ready.expert for ready in device.wait_ready(0, 0))
...     device.release(0, 0)
>>> arrived
[3, 5]
"""

from importlib.metadata import PackageNotFoundError, version

from prestage_hw.contract import DeviceConfig, ModelConfig, preset
from prestage_hw.contract.records import ErrorCode, Phase, PrefetchKind, PrefetchOutcome

from .device import Device, Ready, Refused
from .errors import DeviceError, PrestageError
from .opening import known_links
from .opening import open_device as open

__all__ = [
    "Device",
    "DeviceConfig",
    "DeviceError",
    "ErrorCode",
    "ModelConfig",
    "Phase",
    "PrefetchKind",
    "PrefetchOutcome",
    "PrestageError",
    "Ready",
    "Refused",
    "__version__",
    "known_links",
    "open",
    "preset",
]

try:
    __version__ = version("prestage")
except PackageNotFoundError:  # a source tree that isn't installed
    __version__ = "0+unknown"
