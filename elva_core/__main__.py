"""`python -m elva_core`: see cli/."""

import sys

try:
    from elva_core.cli import main
except KeyboardInterrupt:  # while the commands are imported
    sys.stderr.write("interrupted\n")
    sys.exit(130)

sys.exit(main())
