"""`python -m streamd` is `streamd`."""

import sys

from streamd.cli import main

sys.exit(main())
