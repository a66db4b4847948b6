"""``python -m trl_parity``."""

import sys

from .cli import main

sys.exit(main())
