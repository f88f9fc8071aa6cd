from __future__ import annotations

import pytest

from streamd.wire.path_models import climbs, model_in_path, models_in_path, with_model


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


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/models", ""),
        ("/v1/chat/completions", ""),
        ("/v1/models/org%2Fm", "org/m"),
        ("/v1/models/org/m", "org/m"),
        ("/v1/models/llama3%3A8b/", "llama3:8b"),
        ("/v1/engines/org%2Fm/completions", "org/m"),
        ("/v1beta/models/org%2Fm:generateContent", "org/m"),
        ("/v1/models/%256d", "%6d"),
    ],
)
def test_a_server_takes_the_name_that_it_decodes_once(path: str, model: str) -> None:
    assert model_in_path(path) == model


@pytest.mark.parametrize(
    ("path", "renamed"),
    [
        ("/v1/models/m", "/v1/models/org%2Fother:8b"),
        ("/v1/models/org%2Fm", "/v1/models/org%2Fother:8b"),
        ("/v1/engines/m/completions", "/v1/engines/org%2Fother:8b/completions"),
        ("/v1/models/m:predict", "/v1/models/org%2Fother:8b:predict"),
        ("/v1/models/m/", "/v1/models/org%2Fother:8b/"),
        ("/v1/embeddings", "/v1/embeddings"),
    ],
)
def test_another_model_takes_the_place_of_the_name_alone(path: str, renamed: str) -> None:
    assert with_model(path, "org/other:8b") == renamed


@pytest.mark.parametrize("slash", ["%2f", "%2F"])
@pytest.mark.parametrize(
    ("path", "leads_out"),
    [
        ("/v1/models/org{}m", False),
        ("/v1/models/org{}m{}", False),
        ("/v1/openai/deployments/org{}m/chat/completions", False),
        ("/v1beta/tunedModels/org{}m:generateContent", False),
        ("/v1/models/{}m", True),
        ("/v1/models{}m", True),
        ("/v1{}models/m", True),
        ("/v1/responses{}resp_1", True),
        ("/v1/chat{}completions", True),
        ("/v1/files/a{}b", True),
        ("/v1/a%2E{}models/x", True),
        ("/v1/models/m{}{}x", True),
        ("/v1/models/m{}..{}x", True),
        ("/v1/models/m{}..", True),
        ("/v1/models/m{}.{}x", True),
        ("/v1/models/m{}%2e%2e{}x", True),
        ("/v1/models/..{}..{}responses", True),
    ],
)
def test_a_slash_is_encoded_only_inside_a_name_of_a_model(path: str, leads_out: bool, slash: str) -> None:
    assert climbs(path.replace("{}", slash)) is leads_out
