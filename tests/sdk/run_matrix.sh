#!/bin/sh
# The SDK tests with the major version of the openai SDK before the one that `make test` uses: 2.x goes through httpx,
# 3.x through httpx2, and both are in use. Keeps its environment in .venv-openai2. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/../.."
venv=.venv-openai2
if [ ! -e "$venv/.ready" ] || [ setup.cfg -nt "$venv/.ready" ]; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable . 'openai>=2,<3' anthropic google-genai pytest hypothesis
    touch "$venv/.ready"
fi
"$venv/bin/python" -c 'import openai; print("openai", openai.__version__)'
exec "$venv/bin/python" -m pytest tests/sdk "$@"
