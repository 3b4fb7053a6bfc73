"""``python -m prestage_fpga``: the build that ``make bitstream`` makes."""

from .ecpix5 import main

if __name__ == "__main__":
    main()
