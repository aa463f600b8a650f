"""`python -m qlx` does what `qlx` does."""

import sys

from qlx.cli import main

sys.exit(main())
