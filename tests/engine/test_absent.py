"""Without an engine nothing of it is imported: neither its code nor the parser of its replies."""

from __future__ import annotations

import subprocess
import sys


def test_a_worker_without_an_engine_imports_nothing_of_it() -> None:
    code = (
        "import sys, streamd.cli, streamd.daemon.worker_process, streamd.daemon.parent\n"
        "print([name for name in sys.modules if (name + '.').startswith(('streamd.engine.', 'hiredis.'))])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
