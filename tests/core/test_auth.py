import pytest

from streamd.core.auth import ADMIN, ANONYMOUS, HeadersGet, Key, Refusal, bearer, presented_keys, principal_without_keys
from streamd.reasons import CloseReason


def headers(**named: bytes) -> HeadersGet:
    by_name = {name.replace("_", "-").encode(): value for name, value in named.items()}
    return by_name.get


def key(**rights: object) -> Key:
    return Key(id="k1", name="alice", salt=b"", digest=b"", **rights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "credential"),
    [
        (b"Bearer abc", b"abc"),
        (b"bearer abc", b"abc"),
        (b"BEARER   abc  ", b"abc"),
        (b"Bearer a b", b"a b"),  # kept whole, so that it fails as a key
        (b"Bearer", None),
        (b"Bearer ", None),
        (b"Basic abc", None),
        (b"abc", None),
        (b"", None),
    ],
)
def test_the_scheme_bearer_is_read_in_any_case(value: bytes, credential: bytes | None) -> None:
    assert bearer(headers(authorization=value)) == credential


@pytest.mark.parametrize(
    ("get", "query", "found"),
    [
        (headers(authorization=b"Bearer one", x_api_key=b"two"), "", [b"one", b"two"]),
        (headers(authorization=b"Basic one", x_api_key=b"two"), "", [b"two"]),
        (headers(x_api_key=b" two "), "", [b"two"]),
        (headers(api_key=b"two"), "", [b"two"]),
        (headers(x_goog_api_key=b"two", api_key=b"three"), "key=sk-four", [b"two", b"three"]),
        (headers(), "key=sk-four", []),
        (headers(x_api_key=b""), "", []),
        (headers(), "", []),
    ],
)
def test_keys_are_found_in_every_place_where_sdks_put_them(get: HeadersGet, query: str, found: list[bytes]) -> None:
    assert list(presented_keys(get, query)) == found


def test_a_key_of_any_shape_is_found_in_the_query_of_an_api_that_has_it_there() -> None:
    assert list(presented_keys(headers(api_key=b"one"), "key=AIza&key=two", "key")) == [b"one", b"AIza"]
    assert list(presented_keys(headers(), "key=", "key")) == []


def test_without_keys_a_credential_is_a_principal() -> None:
    one = principal_without_keys(headers(authorization=b"Bearer one"))
    assert one == principal_without_keys(headers(x_api_key=b"one"))
    assert one.id not in ("one", ANONYMOUS.id, ADMIN.id)
    assert "one" not in one.id
    assert one.id.startswith("h-")
    assert len(one.id) == 24
    assert not one.admin
    assert one != principal_without_keys(headers(authorization=b"Bearer two"))
    assert principal_without_keys(headers(authorization=b"Basic one")) != ANONYMOUS


@pytest.mark.parametrize("get", [headers(), headers(authorization=b""), headers(x_api_key=b"")])
def test_without_keys_a_request_without_credential_is_anonymous(get: HeadersGet) -> None:
    assert principal_without_keys(get) is ANONYMOUS


def test_a_principals_id_is_the_same_after_a_restart() -> None:
    assert principal_without_keys(headers(x_api_key=b"one")).id == "h-dpLDrTVAu4A8Ags67mbNiA"


@pytest.mark.parametrize(
    ("routes", "path", "allowed"),
    [
        (("*",), "/v1/chat/completions", True),
        (("/v1/chat/*",), "/v1/chat/completions", True),
        (("/v1/chat/*",), "/v1/embeddings", False),
        (("/v1/chat/*",), "/v1/%63hat/completions", False),
        (("/v1/models", "/v1/chat/*"), "/v1/models", True),
    ],
)
def test_a_key_with_routes_opens_only_those(routes: tuple[str, ...], path: str, allowed: bool) -> None:
    refusal = key(routes=routes).refuse_route(path)
    assert (refusal is None) is allowed
    assert refusal is None or (refusal.status, refusal.code) == (403, "route_not_allowed")


@pytest.mark.parametrize(
    ("models", "model", "allowed"),
    [
        (("*",), "gpt", True),
        (("*",), None, True),
        (("llama-*",), "llama-3", True),
        (("llama-*",), "gpt", False),
        (("llama-*",), "Llama-3", False),
        (("llama-*",), None, False),  # a body that isn't parsed may name any model
    ],
)
def test_a_key_with_models_opens_only_those(models: tuple[str, ...], model: str | None, allowed: bool) -> None:
    refusal = key(models=models).refuse_model(model)
    assert (refusal is None) is allowed
    assert refusal is None or (refusal.status, refusal.code) == (403, "model_not_allowed")


@pytest.mark.parametrize(
    ("reason", "code", "challenge"),
    [
        (CloseReason.UNAUTHORIZED, "api_key_required", b'Bearer realm="streamd"'),
        (CloseReason.UNAUTHORIZED, "invalid_api_key", b'Bearer realm="streamd", error="invalid_token"'),
        (CloseReason.TOKEN_EXPIRED, "token_expired", b'Bearer realm="streamd", error="invalid_token"'),
        (CloseReason.FORBIDDEN, "route_not_allowed", None),
        (CloseReason.RATE_LIMITED, "rate_limit_exceeded", None),
    ],
)
def test_a_401_carries_a_challenge(reason: CloseReason, code: str, challenge: bytes | None) -> None:
    assert Refusal(reason, code, "").challenge == challenge
