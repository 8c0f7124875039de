"""``python -m dbmpi``."""

import sys

from dbmpi.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
