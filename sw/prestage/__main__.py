"""``python -m prestage``."""

import sys

from .cli import main

sys.exit(main())
