from __future__ import annotations

import pytest

from streamd.wire.path_models import models_in_path


@pytest.mark.parametrize(
    ("path", "models"),
    [
        ("/v1/models", ()),
        ("/v1/models/", ()),
        ("/v1/chat/completions", ()),
        ("/v1/models/m", ("m",)),
        ("/v1/MODELS/m", ("m",)),
        ("/v1/models/m/", ("m",)),
        ("/v1/models/ft:gpt:org", ("ft:gpt:org",)),
        ("/v1/models/llama3:8b", ("llama3:8b",)),
        ("/v1/models/org/m", ("org/m",)),
        ("/v1/models/m/unload", ("m",)),
        ("/v1/models/m/unload/", ("m",)),
        ("/v1/models/m/other", ("m/other",)),  # not known: the right is for the whole
        ("/v1/engines/m/completions", ("m",)),
        ("/v1/engines/org/m/chat/completions", ("org/m",)),
        ("/v1/openai/deployments/m/embeddings", ("m",)),
        ("/v1beta/openai/models/m", ("m",)),
        ("/v1/%6dodels/m", ("m",)),
        ("/v1/models/%6d", ("%6d", "m")),
        ("/v1/models/%256d", ("%256d", "%6d", "m")),
        ("/v1/models/a%0ab", ("a%0ab", "a\nb")),
    ],
)
def test_a_path_names_its_model_in_each_way_that_it_may_be_decoded(path: str, models: tuple[str, ...]) -> None:
    assert models_in_path(path) == models
