"""`python -m elva_core`: see commands.py."""

import sys

from elva_core.commands import main

sys.exit(main())
