"""`python -m opd.train` with a large eps in AdamW, which at its default blows up rounding errors."""

import sys

from opd import train
from opd.training import build

build.ADAM_EPS = 1e-3
if __name__ == "__main__":
    sys.exit(train.main())
