"""The model that a path names outside of Google's API: `/v1/models/{model}`, `/v1/engines/{model}/completions`, and
the longer paths of Vertex (`/v1/projects/…/models/{model}:predict`) and Bedrock (`/v1/model/{model}/invoke`).

Which paths of an upstream take a model isn't known here, so each form that servers of OpenAI's API have is read, in any
case, and an ending that isn't known counts to the name: a right is then refused rather than granted by mistake.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

_NAMED: Final = re.compile(r"/v1(?:beta)?/(?:[^/]+/)*?(?:models?|engines|deployments)/(.+)", re.IGNORECASE | re.DOTALL)
# What a server does with a model, behind its name.
_ACTION: Final = re.compile(
    r"(?:/(?:chat/completions|completions|embeddings|edits|generate|search|load|unload|cancel"
    r"|invoke|invoke-with-response-stream|converse|converse-stream)"
    r"|:(?:generateContent|streamGenerateContent|countTokens|embedContent|batchEmbedContents"
    r"|predict|rawPredict|streamRawPredict|serverStreamingPredict))/*\Z",
    re.IGNORECASE,
)
# A path that is decoded twice on its way names another model at each time.
_DECODED_MAX: Final = 3


def models_in_path(path: str) -> tuple[str, ...]:
    """The model that a path names, once for each way in which it may be decoded; empty if it names none."""
    found: dict[str, None] = {}
    for _ in range(_DECODED_MAX):
        named = _NAMED.fullmatch(path)
        if named is not None:
            found[_ACTION.sub("", named[1]).rstrip("/")] = None
        path = unquote(path)
    return tuple(found)
