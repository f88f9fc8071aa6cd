"""`python -m streamd.daemon` is a process that the parent starts: a worker, or the mover of saved streams.

An environment variable says which of the two, and how (daemon/control.py). The command line repeats the parent's, for
`ps`.
"""

import os
import sys

from streamd.daemon.control import STATE_VARIABLE, WORKER_VARIABLE

if WORKER_VARIABLE in os.environ:
    from streamd.daemon import worker_process

    sys.exit(worker_process.run())
if STATE_VARIABLE in os.environ:
    from streamd.daemon import state_process

    sys.exit(state_process.run())
sys.exit("streamd starts this by itself; run `streamd serve`")
