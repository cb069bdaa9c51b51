"""`python -m opd` is `opd`."""

import sys

from opd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
