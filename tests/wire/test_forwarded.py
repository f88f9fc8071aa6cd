import ipaddress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamd.wire.forwarded import FORWARDED, HOPS_MAX, TrustedProxies

PROXIES = ["10.0.0.0/8", "fd00::/8", "unix"]
XFF = TrustedProxies.of(PROXIES)
RFC7239 = TrustedProxies.of(PROXIES, header=FORWARDED)
PROXY = "10.0.0.1"


@pytest.mark.parametrize(
    ("peer", "value", "client"),
    [
        # A peer that isn't trusted is the client, whatever its header says.
        ("192.0.2.1", b"198.51.100.7", "192.0.2.1"),
        ("127.0.0.1", b"198.51.100.7", "127.0.0.1"),
        ("2001:db8::1", b"198.51.100.7", "2001:db8::1"),
        # A trusted peer without the header is the client itself.
        (PROXY, None, PROXY),
        (PROXY, b"", PROXY),
        (None, None, None),
        # A single hop, in all spellings.
        (PROXY, b"198.51.100.7", "198.51.100.7"),
        (PROXY, b" 198.51.100.7 ", "198.51.100.7"),
        (PROXY, b"198.51.100.7:4711", "198.51.100.7"),
        (PROXY, b"2001:db8::1", "2001:db8::1"),
        (PROXY, b"[2001:DB8::1]", "2001:db8::1"),
        (PROXY, b"[2001:db8::1]:4711", "2001:db8::1"),
        (PROXY, b"::ffff:198.51.100.7", "198.51.100.7"),
        (PROXY, b"fe80::1%eth0", "fe80::1"),
        ("::ffff:10.0.0.1", b"198.51.100.7", "198.51.100.7"),
        ("fd00::5", b"198.51.100.7", "198.51.100.7"),
        (None, b"198.51.100.7", "198.51.100.7"),
        # The rightmost untrusted address counts; the client may have invented everything left of it.
        (PROXY, b"6.6.6.6, 198.51.100.7", "198.51.100.7"),
        (PROXY, b"6.6.6.6, 198.51.100.7, 10.1.1.1, 10.2.2.2", "198.51.100.7"),
        (PROXY, b"6.6.6.6, 10.9.9.9, 198.51.100.7, ::ffff:10.1.1.1", "198.51.100.7"),
        (PROXY, b"10.3.3.3, 10.2.2.2", "10.3.3.3"),  # a client inside the trusted network
        # A text that is no address ends the walk at the hop before.
        (PROXY, b"unknown", PROXY),
        (PROXY, b"6.6.6.6, unknown", PROXY),
        (PROXY, b"6.6.6.6, unknown, 10.1.1.1", "10.1.1.1"),
        (PROXY, b"6.6.6.6,,10.1.1.1", "10.1.1.1"),
        (PROXY, b"198.51.100.7,", PROXY),
        (PROXY, b"198.51.100.256", PROXY),
        (PROXY, b"0x7f.1", PROXY),
        (PROXY, b"010.0.0.1", PROXY),
        (PROXY, b"198.51.100.7:port", PROXY),
        (PROXY, b"[198.51.100.7]", "198.51.100.7"),
        (PROXY, b"2001:db8::1]:1", PROXY),
        (PROXY, b"\xff\xfe", PROXY),
        (PROXY, b"3221225985", PROXY),
    ],
)
def test_x_forwarded_for_names_the_rightmost_untrusted_address(
    peer: str | None, value: bytes | None, client: str | None
) -> None:
    assert XFF.client_address(peer, value) == client


@pytest.mark.parametrize(
    ("value", "client"),
    [
        (b"for=198.51.100.7", "198.51.100.7"),
        (b"For=198.51.100.7;proto=https;by=10.0.0.1", "198.51.100.7"),
        (b'proto=https; for="198.51.100.7:4711"', "198.51.100.7"),
        (b'for="[2001:db8::1]:4711"', "2001:db8::1"),
        (b'for="[2001:db8::1]:_port"', "2001:db8::1"),
        (b"for=6.6.6.6, for=198.51.100.7, for=10.1.1.1", "198.51.100.7"),
        (b'for=198.51.100.7;host="a, b;for=6.6.6.6"', "198.51.100.7"),
        (b'for=198.51.100.7;host="a\\", for=6.6.6.6;x=\\"b"', "198.51.100.7"),
        # A client's text can't spoil the address that a proxy appended.
        (b'for=", for=198.51.100.7', "198.51.100.7"),
        (b'"""""", for=198.51.100.7', "198.51.100.7"),
        (b'for="6.6.6.6, for=198.51.100.7, for=10.1.1.1', "198.51.100.7"),
        # The walk ends.
        (b"for=unknown", PROXY),
        (b"for=_hidden, for=10.1.1.1", "10.1.1.1"),
        (b"proto=https", PROXY),
        (b"for=198.51.100.7;for=6.6.6.6", PROXY),
        (b"for=198.51.100.7, ", PROXY),
        (b"for = 198.51.100.7", PROXY),
        (b"for=198.51.100.7;", PROXY),
        (b"for=2001:db8::1", PROXY),  # has to be quoted and in brackets
        (b"198.51.100.7", PROXY),
        (b'for="198.51.100.7', PROXY),
    ],
)
def test_forwarded_names_the_rightmost_untrusted_address(value: bytes, client: str) -> None:
    assert RFC7239.client_address(PROXY, value) == client


def test_a_chain_is_followed_up_to_a_bound() -> None:
    assert XFF.client_address(PROXY, b"198.51.100.7" + b",10.1.1.1" * HOPS_MAX) == "10.1.1.1"
    assert XFF.client_address(PROXY, b"198.51.100.7" + b",10.1.1.1" * (HOPS_MAX - 1)) == "198.51.100.7"
    assert RFC7239.client_address(PROXY, b"for=198.51.100.7" + b",for=10.1.1.1" * HOPS_MAX) == "10.1.1.1"
    assert RFC7239.client_address(PROXY, b"for=198.51.100.7" + b",for=10.1.1.1" * (HOPS_MAX - 1)) == "198.51.100.7"


def test_without_trusted_proxies_no_header_is_believed() -> None:
    nobody = TrustedProxies()
    assert nobody.client_address("10.0.0.1", b"198.51.100.7") == "10.0.0.1"
    assert nobody.client_address(None, b"198.51.100.7") is None
    assert not nobody.trusts("127.0.0.1")


@pytest.mark.parametrize(
    ("peer", "counted_by"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("127.0.0.1", None),
        ("127.9.9.9", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("10.0.0.1", None),
        (None, None),
    ],
)
def test_a_peer_is_gated_by_its_address_unless_it_is_a_proxy_or_local(peer: str | None, counted_by: str | None) -> None:
    assert XFF.gated(peer) == counted_by
    assert TrustedProxies().gated(peer) == ("10.0.0.1" if peer == "10.0.0.1" else counted_by)


@pytest.mark.parametrize("text", ["", "proxy.example", "10.0.0.0/33", "10.0.0", "fd00::/129", "*"])
def test_a_text_that_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/8"):
        TrustedProxies.of([text])


@pytest.mark.parametrize("text", ["10.0.0.7", "10.0.0.7/8", "::ffff:10.0.0.0/104", "::ffff:10.0.0.7"])
def test_a_network_may_have_host_bits_and_blanks(text: str) -> None:
    assert TrustedProxies.of([text]).trusts("10.0.0.7")
    assert not TrustedProxies.of([text]).trusts("11.0.0.7")


@given(st.binary(max_size=400), st.sampled_from([XFF, RFC7239]), st.sampled_from([PROXY, None]))
def test_any_header_gives_an_address_or_the_peer(value: bytes, proxies: TrustedProxies, peer: str | None) -> None:
    client = proxies.client_address(peer, value)
    assert client == peer or ipaddress.ip_address(str(client))


@given(st.text('for=;," \\.:[]1', max_size=60), st.ip_addresses(v=4))
def test_a_client_cannot_hide_behind_an_invented_chain(invented: str, real: ipaddress.IPv4Address) -> None:
    client = str(real)
    assume(not XFF.trusts(client))
    assert XFF.client_address(PROXY, f"{invented}, {real}".encode()) == client
    assert RFC7239.client_address(PROXY, f"{invented}, for={real}".encode()) == client


def test_a_hostile_header_is_parsed_in_linear_time() -> None:
    # Quadratic or worse would show: 16 KiB is all that a head may hold.
    for value in (b'"' * 16384, b"," * 16384, b'for="' * 3276, b"for=a;" * 2730, b'a="\\' * 4096):
        assert RFC7239.client_address(PROXY, value) == PROXY


@pytest.mark.parametrize(
    ("proxies", "peer", "value", "known"),
    [
        (XFF, PROXY, None, True),  # the proxy itself
        (XFF, PROXY, b"198.51.100.7", True),
        (XFF, PROXY, b"unknown, 198.51.100.7", True),
        (XFF, PROXY, b"10.3.3.3, 10.2.2.2", True),
        (XFF, "192.0.2.1", b"unknown", True),  # no proxy: its header says nothing
        (XFF, PROXY, b"", False),
        (XFF, PROXY, b"unknown", False),
        (XFF, PROXY, b"unknown, 10.2.2.2", False),
        (XFF, PROXY, b"198.51.100.7,", False),
        (XFF, PROXY, b", ".join([b"10.1.1.1"] * (HOPS_MAX + 1)), False),
        (XFF, None, b"unknown", False),
        (RFC7239, PROXY, b"for=198.51.100.7", True),
        (RFC7239, PROXY, b"for=unknown", False),
        (RFC7239, PROXY, b'for="_hidden"', False),
        (RFC7239, PROXY, b"proto=https", False),
        (RFC7239, PROXY, b'for=""', False),
        (RFC7239, None, b"by=10.0.0.1", False),
    ],
)
def test_a_client_that_its_proxy_hides_is_not_known(
    proxies: TrustedProxies, peer: str | None, value: bytes | None, known: bool
) -> None:
    assert proxies.knows_client(peer, value) is known
