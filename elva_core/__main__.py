"""`python -m elva_core`: see cli/."""

import sys

from elva_core.cli import main

sys.exit(main())
