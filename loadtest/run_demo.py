"""`make run`: the built-in synthetic upstream with streamd in front of it, and curl lines to paste."""

from __future__ import annotations

import sys

import launch

DEMO = launch.Demo(
    about="mock-llm, a synthetic model",
    command=(sys.executable, "-m", "streamd", "mock-llm", "--listen", "127.0.0.1:0", "--jitter-ms", "15"),
    path="/v1/chat/completions",
    body={"model": "mock-llm", "stream": True, "messages": [{"role": "user", "content": "Tell me about streams."}]},
)

if __name__ == "__main__":
    sys.exit(launch.launch(launch.parse_listen(__doc__), DEMO))
