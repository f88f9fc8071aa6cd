import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from streamd.core import tokens as module
from streamd.core.auth import HeadersGet, Refusal
from streamd.core.tokens import (
    EXPIRED,
    Grant,
    TokenKeyError,
    Verifier,
    VerifyKey,
    load_jwks,
    load_secret,
    token_to_publish,
    token_to_read,
)

NOW = 1_700_000_000.0
AUDIENCE = "streamd"
SECRET = b"0123456789abcdef0123456789abcdef"
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
ED = ed25519.Ed25519PrivateKey.generate()
EC = ec.generate_private_key(ec.SECP256R1())


def jwk(private: Any, **fields: object) -> dict[str, Any]:
    kinds: dict[type, Any] = {rsa.RSAPrivateKey: RSAAlgorithm, ed25519.Ed25519PrivateKey: OKPAlgorithm}
    algorithm = next((each for kind, each in kinds.items() if isinstance(private, kind)), ECAlgorithm)
    row = {**algorithm.to_jwk(private.public_key(), as_dict=True), **fields}
    return {name: value for name, value in row.items() if value is not ...}


def jwks(*rows: object) -> bytes:
    return orjson.dumps({"keys": rows})


SET = jwks(jwk(RSA, kid="r1"), jwk(ED, kid="e1"))
VERIFIER = Verifier((load_secret(SECRET), *load_jwks(SET)), audience=AUDIENCE)


def claims(**changed: object) -> dict[str, object]:
    full = {"aud": AUDIENCE, "exp": int(NOW) + 60, "streams": ["room-*"], "publish": ["room-1"], "sub": "u1"} | changed
    return {name: value for name, value in full.items() if value is not ...}


def sign(
    key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **changed: object
) -> bytes:
    return jwt.encode(claims(**changed), key, algorithm, headers).encode()


def b64(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


def forge(header: object, payload: bytes | None = None, key: bytes = SECRET) -> bytes:
    """A token with any header and payload and a right HMAC, as only the holder of `key` can make it."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    signed = b64(head) + b"." + b64(json.dumps(claims()).encode() if payload is None else payload)
    return signed + b"." + b64(hmac.digest(key, signed, hashlib.sha256))


def refusal(token: bytes, verifier: Verifier = VERIFIER, now_unix: float = NOW) -> Refusal:
    answer = verifier.verify(token, now_unix)
    assert isinstance(answer, Refusal), answer
    assert answer.status == 401
    return answer


def granted(token: bytes, verifier: Verifier = VERIFIER, now_unix: float = NOW) -> Grant:
    answer = verifier.verify(token, now_unix)
    assert isinstance(answer, Grant), answer
    return answer


@pytest.mark.parametrize(
    "token",
    [
        sign(),
        sign(headers={"kid": "any"}),  # a secret has no id
        sign(RSA, "RS256", {"kid": "r1"}),
        sign(RSA, "RS256"),  # a single RSA key: the choice is clear
        sign(ED, "EdDSA", {"kid": "e1"}),
        sign(ED, "EdDSA"),
    ],
)
def test_each_kind_of_key_verifies_its_tokens(token: bytes) -> None:
    assert granted(token) == Grant(("room-*",), ("room-1",), NOW + 60, "u1")


def test_the_right_to_read_and_the_right_to_publish_are_separate() -> None:
    grant = granted(sign(streams=["a", "b-*"], publish=["c"]))
    assert [grant.may_read(name) for name in ("a", "b-1", "b", "c", "")] == [True, True, False, False, False]
    assert [grant.may_publish(name) for name in ("a", "b-1", "c")] == [False, False, True]
    assert granted(sign(streams=..., publish=...)) == Grant((), (), NOW + 60, "u1")
    assert not granted(sign(streams=...)).may_read("room-1")
    assert not granted(sign(publish=...)).may_publish("room-1")


# Algorithm confusion (RFC 8725 2.1, 3.1)


def no_signature(token: bytes) -> bytes:
    return token.rpartition(b".")[0] + b"."


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", ""])
@pytest.mark.parametrize("signature", [b"", b"AA"])
def test_the_algorithm_none_is_refused(algorithm: str, signature: bytes) -> None:
    refusal(no_signature(forge({"alg": algorithm})) + signature)


def public_texts() -> dict[str, bytes]:
    encoding, formats = serialization.Encoding, serialization.PublicFormat
    return {
        "rsa-pem": RSA.public_key().public_bytes(encoding.PEM, formats.SubjectPublicKeyInfo),
        "rsa-pkcs1": RSA.public_key().public_bytes(encoding.PEM, formats.PKCS1),
        "rsa-der": RSA.public_key().public_bytes(encoding.DER, formats.SubjectPublicKeyInfo),
        "ed-pem": ED.public_key().public_bytes(encoding.PEM, formats.SubjectPublicKeyInfo),
        "ed-raw": ED.public_key().public_bytes(encoding.Raw, formats.Raw),
        "jwk": json.dumps(jwk(RSA, kid="r1")).encode(),
        "jwks": SET,
    }


@pytest.mark.parametrize("public", public_texts().values(), ids=list(public_texts()))
@pytest.mark.parametrize("header", [{}, {"kid": "r1"}, {"kid": "e1"}])
def test_a_public_key_is_not_taken_as_a_secret(public: bytes, header: dict[str, str]) -> None:
    for verifier in (VERIFIER, Verifier(load_jwks(SET), audience=AUDIENCE)):
        refusal(forge({"alg": "HS256", **header}, key=public), verifier)


@pytest.mark.parametrize("algorithm", ["HS384", "HS512", "RS384", "RS512", "PS256", "ES256", "ES256K", "hs256", "dir"])
def test_an_algorithm_without_a_key_is_refused_before_cryptography(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwt.PyJWS, "decode", lambda *_, **__: pytest.fail("there was a key"))
    assert "algorithm (`alg`) has to be one of HS256, RS256, EdDSA" in refusal(forge({"alg": algorithm})).message


@pytest.mark.parametrize(
    ("signer", "algorithm", "header"),
    [
        (RSA, "RS256", {"kid": "e1", "alg": "EdDSA"}),
        (RSA, "RS512", {"kid": "r1"}),
        (RSA, "PS256", {"kid": "r1", "alg": "RS256"}),
        (ED, "EdDSA", {"kid": "r1", "alg": "RS256"}),
        (EC, "ES256", {"kid": "r1"}),
        (SECRET, "HS512", {"alg": "HS256"}),
        (OTHER_RSA, "RS256", {"kid": "r1"}),
        (b"x" * 32, "HS256", {}),
    ],
)
def test_a_signature_of_another_algorithm_or_key_is_refused(
    signer: Any, algorithm: str, header: dict[str, str]
) -> None:
    kind = jwt.get_algorithm_by_name(algorithm)
    signed = b64(json.dumps({"alg": algorithm, **header}).encode()) + b"." + b64(json.dumps(claims()).encode())
    refusal(signed + b"." + b64(kind.sign(signed, kind.prepare_key(signer))))


def test_without_a_secret_hs256_is_refused() -> None:
    assert "algorithm" in refusal(sign(), Verifier(load_jwks(SET), audience=AUDIENCE)).message
    assert "algorithm" in refusal(sign(RSA, "RS256"), Verifier((load_secret(SECRET),), audience=AUDIENCE)).message


@pytest.mark.parametrize(
    "extra",
    [
        {"crit": ["b64"], "b64": False},
        {"crit": ["exp"]},
        {"crit": []},
        {"b64": False},
        {"b64": True},
        {"jwk": jwk(OTHER_RSA)},
        {"x5c": ["AAAA"]},
        {"kid": 1},
        {"kid": None},
        {"kid": ["r1"]},
        {"typ": {}},
    ],
)
def test_a_header_that_asks_for_more_is_refused(extra: dict[str, object]) -> None:
    assert "header" in refusal(forge({"alg": "HS256", **extra})).message


@pytest.mark.parametrize("kid", ["r2", "R1", "", "../../dev/null", "r1' OR '1'='1"])
def test_a_kid_only_looks_up_a_key(kid: str) -> None:
    assert "`kid`" in refusal(sign(RSA, "RS256", {"kid": kid})).message


def test_two_keys_in_rotation_are_told_apart_by_kid() -> None:
    keys = load_jwks(jwks(jwk(RSA, kid="old"), jwk(OTHER_RSA, kid="new")))
    verifier = Verifier(keys, audience=AUDIENCE)
    granted(sign(RSA, "RS256", {"kid": "old"}), verifier)
    granted(sign(OTHER_RSA, "RS256", {"kid": "new"}), verifier)
    refusal(sign(RSA, "RS256", {"kid": "new"}), verifier)
    assert "`kid`" in refusal(sign(RSA, "RS256"), verifier).message


def test_a_key_without_an_id_serves_every_kid() -> None:
    verifier = Verifier(load_jwks(jwks(jwk(RSA))), audience=AUDIENCE)
    granted(sign(RSA, "RS256", {"kid": "whatever"}), verifier)
    granted(sign(RSA, "RS256"), verifier)


# Malformed tokens


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b".",
        b"..",
        b"a.b.c",
        b"a.b",
        b"sk-abc-defdefdefdefdef",
        sign() + b".x",
        sign() + b"\n",
        b" " + sign(),
        sign() + b"=",
        no_signature(sign()),
        sign().replace(b".", b"+", 1),
        b"\xff" * 100,
        b"\x00",
        sign()[:-4],
        b"." + sign().partition(b".")[2],
        forge(b"[]"),
        forge(b'"alg"'),
        forge(b"null"),
        forge(b"{}"),
        forge(b'{"alg": 1}'),
        forge(b'{"alg": "HS256"'),
        forge(b'{"alg": "HS\xff256"}'),
        forge(b'{"a":' * 500),
        forge(b"[" * 700),
        forge(b'{"alg": "HS256", "x": "' + b"x" * 1024 + b'"}'),
    ],
)
def test_garbage_is_refused_before_cryptography(token: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = jwt.algorithms.HMACAlgorithm.verify
    checked: list[object] = []
    monkeypatch.setattr(jwt.algorithms.HMACAlgorithm, "verify", lambda *of: (checked.append(of), verify(*of))[1])
    refusal(token)
    assert not checked or token == sign()[:-4]


def test_an_oversized_token_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    large = sign(junk="x" * 8192)
    monkeypatch.setattr(module, "_SHAPE", None)
    assert "over 8192 bytes" in refusal(large).message


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"{", b'"x"', b"\xff", b"[" * 3000, b'{"exp": NaN}'])
def test_a_signed_payload_that_is_no_object_is_refused(payload: bytes) -> None:
    refusal(forge({"alg": "HS256"}, payload))


def test_every_byte_of_a_token_counts() -> None:
    token = sign()
    for at in range(len(token)):
        for changed in (b"A", b"B", b"."):
            if token[at : at + 1] != changed:
                answer = VERIFIER.verify(token[:at] + changed + token[at + 1 :], NOW)
                # The last letter of 32 bytes in base64url carries four bits and two unused bits (RFC 4648 3.5).
                assert isinstance(answer, Refusal) or at == len(token) - 1


# Claims


@pytest.mark.parametrize(
    ("audience", "is_ours"),
    [
        ("streamd", True),
        (["streamd"], True),
        (["other", "streamd"], True),
        ("other", False),
        ("Streamd", False),
        ("streamd2", False),
        ("stream", False),
        ("", False),
        ([], False),
        (["other"], False),
        ([["streamd"]], False),
        ({"streamd": 1}, False),
        (1, False),
        (None, False),
        (..., False),
    ],
)
def test_a_token_for_another_audience_is_refused(audience: object, is_ours: bool) -> None:
    answer = VERIFIER.verify(forge({"alg": "HS256"}, json.dumps(claims(aud=audience)).encode()), NOW)
    assert isinstance(answer, Grant) is is_ours
    assert is_ours or (isinstance(answer, Refusal) and "`aud`" in answer.message)


@pytest.mark.parametrize("leeway_s", [0.0, 30.0])
def test_a_token_is_valid_from_nbf_to_exp_with_leeway(leeway_s: float) -> None:
    verifier = Verifier((load_secret(SECRET),), audience=AUDIENCE, leeway_s=leeway_s)
    token = sign(nbf=int(NOW), exp=int(NOW) + 60)
    assert "`nbf`" in refusal(token, verifier, NOW - leeway_s - 0.01).message
    for now_unix in (NOW - leeway_s, NOW, NOW + 59.9 + leeway_s):
        assert granted(token, verifier, now_unix).expires_unix == NOW + 60 + leeway_s
    for late_s in (0.0, 1.0, 1e9):
        assert refusal(token, verifier, NOW + 60 + leeway_s + late_s) is EXPIRED


@pytest.mark.parametrize("bad", [..., None, "1700000060", True, [], {}, "x"])
def test_exp_is_required_and_a_number(bad: object) -> None:
    token = forge({"alg": "HS256"}, json.dumps(claims(exp=bad)).encode())
    assert "`exp`" in refusal(token).message


@pytest.mark.parametrize("bad", [None, "0", False, []])
def test_nbf_is_a_number(bad: object) -> None:
    assert "`nbf`" in refusal(forge({"alg": "HS256"}, json.dumps(claims(nbf=bad)).encode())).message


@pytest.mark.parametrize("text", [b"1e999", b"-1e999", b"9" * 5000])
def test_an_infinite_exp_is_refused(text: bytes) -> None:
    payload = json.dumps(claims()).encode().replace(b"%d" % (int(NOW) + 60), text)
    refusal(forge({"alg": "HS256"}, payload))


def test_only_the_passed_in_clock_decides_on_times() -> None:
    # Expired by the machine's clock but not by the clock passed in, and the other way round.
    assert granted(sign(exp=1000, iat=10**12), now_unix=999.0).expires_unix == 1000
    assert refusal(sign(exp=10**12), now_unix=10.0**12) is EXPIRED


@pytest.mark.parametrize(
    "patterns",
    [
        "room-1",
        None,
        {"room-1": 1},
        [1],
        [None],
        [["room-1"]],
        [""],
        ["room 1"],
        ["room[0-9]"],
        ["room?"],
        [r"room\*"],
        ["(a+)+$"],
        ["a/b"],
        ["a:b"],
        ["room-1\n"],
        ["räum"],
        ["a" * 257],
        ["a"] * 65,
    ],
)
@pytest.mark.parametrize("claim", ["streams", "publish"])
def test_patterns_that_could_never_match_are_refused(claim: str, patterns: object) -> None:
    changed: dict[str, Any] = {claim: patterns}
    assert "patterns" in refusal(sign(**changed)).message


@pytest.mark.parametrize("subject", [None, 7, ["u1"]])
def test_a_subject_is_a_string(subject: object) -> None:
    assert "`sub`" in refusal(forge({"alg": "HS256"}, json.dumps(claims(sub=subject)).encode())).message


def test_a_refusal_without_a_valid_signature_tells_nothing_of_the_claims() -> None:
    unsigned = sign(b"x" * 32, aud="other", exp=0)
    assert refusal(unsigned).message == refusal(sign(b"x" * 32)).message


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["aud", "exp", "nbf", "streams", "publish", "sub"]),
        st.none()
        | st.booleans()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
        | st.lists(st.text() | st.integers()),
    )
)
def test_any_claims_get_a_grant_or_a_refusal(changed: dict[str, object]) -> None:
    answer = VERIFIER.verify(forge({"alg": "HS256"}, json.dumps(claims() | changed).encode()), NOW)
    assert isinstance(answer, Grant | Refusal)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(token: bytes) -> None:
    refusal(token)


# Key files


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_secrets_line_end_isn_t_part_of_it(end: bytes) -> None:
    assert load_secret(SECRET + end) == VerifyKey("HS256", None, SECRET)


def test_a_binary_secret_is_taken_as_it_is() -> None:
    secret = bytes(range(200, 231)) + b"\n"
    assert load_secret(secret).key == secret


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "0 bytes; HS256 needs 32"),
        (SECRET[:-1] + b"\n", "31 bytes"),
        (public_texts()["rsa-pem"], "JWKS"),
    ],
)
def test_an_unusable_secret_is_refused_with_its_reason(content: bytes, text: str) -> None:
    with pytest.raises(TokenKeyError, match=text):
        load_secret(content)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{}", "not a JSON object"),
        (b'{"keys": {}}', "not a JSON object"),
        (b'{"keys": ["x"]}', "not a JSON object"),
        (b" " * (256 * 1024 + 1), "over 262144 bytes"),
        (jwks(*[{}] * 65), "more than 64"),
        (jwks(), "no usable key"),
        (jwks(jwk(EC), {"kty": "oct", "k": "AAAA"}, {"kty": ["RSA"]}, {}), "no usable key"),
        (jwks(jwk(RSA, use="enc")), "no usable key"),
        (jwks(jwk(RSA, alg="RS512"), jwk(ED, alg="ES256")), "no usable key"),
        (jwks(jwk(RSA, key_ops=["sign"]), jwk(ED, key_ops=1)), "no usable key"),
        (jwks(jwk(RSA, kid=5)), "`kid` has to be a string"),
        (jwks(jwk(RSA, n=...)), "can't be read"),
        (jwks(jwk(RSA, n="!")), "can't be read"),
        (jwks(jwk(ED, x="AAAA")), "can't be read"),
        (jwks(jwk(ED, x=7)), "can't be read"),
        (jwks(jwk(RSA), jwk(OTHER_RSA)), "each needs its own"),
        (jwks(jwk(RSA, kid="a"), jwk(OTHER_RSA, kid="a")), "each needs its own"),
        (jwks(RSAAlgorithm.to_jwk(RSA, as_dict=True)), "is a private key"),
        (jwks(jwk(rsa.generate_private_key(65537, 1024))), "1024 bits"),
    ],
)
def test_an_unusable_key_set_is_refused_with_its_reason(content: bytes, text: str) -> None:
    with pytest.raises(TokenKeyError, match=text):
        load_jwks(content)


def test_unusable_keys_of_a_key_set_are_left_out() -> None:
    keys = load_jwks(
        jwks(jwk(EC, kid="r1"), jwk(RSA, kid="r1", use="sig", alg="RS256", key_ops=["verify"]), {"kty": "new"})
    )
    assert [(key.algorithm, key.kid) for key in keys] == [("RS256", "r1")]


# Places of a token in a request


def headers(authorization: bytes | None = None, cookie: bytes | None = None) -> HeadersGet:
    return {b"authorization": authorization, b"cookie": cookie}.get


@pytest.mark.parametrize(
    ("get", "query", "to_read", "to_publish"),
    [
        (headers(), "", None, None),
        (headers(b"Bearer h"), "access_token=q", b"h", b"h"),
        (headers(b"Basic h"), "access_token=q", b"q", b"q"),
        (headers(b"Bearer sk-key-secret"), "access_token=q", b"q", b"q"),
        (headers(cookie=b"streamd_token=c"), "access_token=q", b"q", b"q"),
        (headers(cookie=b"streamd_token=c"), "", b"c", None),  # a cookie never publishes
        (headers(cookie=b'a=1; streamd_token="c"; b=2'), "", b"c", None),
        (headers(cookie=b"xstreamd_token=c; streamd_tokens=d; streamd_token"), "", None, None),
        (headers(cookie=b"streamd_token=c; streamd_token=d"), "", b"", None),
        (headers(), "access_token=q&access_token=r", b"", b""),
        (headers(), "a=1&access%5Ftoken=q%2Er&b", b"q.r", b"q.r"),
        (headers(), "Access_Token=q", None, None),
        (headers(), "access_token=", b"", b""),
        (headers(), "access_token=%ff", "\ufffd".encode(), "\ufffd".encode()),
    ],
)
def test_a_token_comes_from_header_query_or_cookie_and_a_cookie_never_publishes(
    get: HeadersGet, query: str, to_read: bytes | None, to_publish: bytes | None
) -> None:
    assert token_to_read(get, query) == to_read
    assert token_to_publish(get, query) == to_publish


def test_verifiers_that_take_the_same_tokens_have_the_same_fingerprint_and_no_others() -> None:
    secret, keys = load_secret(SECRET), load_jwks(SET)
    same = Verifier((*keys, secret), audience=AUDIENCE)
    assert same.fingerprint() == VERIFIER.fingerprint()
    others = [
        Verifier((secret,), audience=AUDIENCE),
        Verifier(keys, audience=AUDIENCE),
        Verifier((secret, *keys), audience="other"),
        Verifier((load_secret(b"y" * 32), *keys), audience=AUDIENCE),
    ]
    assert len({each.fingerprint() for each in (VERIFIER, *others)}) == 5
