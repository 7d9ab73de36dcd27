"""Run the command line as `python -m doraxp`."""

import sys

from doraxp.cli import main

sys.exit(main())
