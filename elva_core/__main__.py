"""`python -m elva_core`: see workbook.py."""

import sys

from elva_core.workbook import main

sys.exit(main())
