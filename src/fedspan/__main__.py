"""`python -m fedspan`: the same as the `fedspan` command."""

import sys

from fedspan.cli.main import main

sys.exit(main())
