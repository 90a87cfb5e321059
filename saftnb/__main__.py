"""``python -m saftnb`` is ``saftnb``."""

import sys

from saftnb.cli import main

if __name__ == "__main__":
    sys.exit(main())
