"""Settings: the order of sources, refusals with their place, and relations between settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from streamd.config import (
    LISTEN_WITHOUT_KEYS,
    ROUTE_ROWS,
    ROWS,
    SECTIONS,
    UPSTREAM_ROWS,
    ConfigError,
    RouteOverride,
    Settings,
    UpstreamSettings,
    load,
    relations,
)
from streamd.rows import WORD_S, Kind, Refused, Row
from streamd.sources import FILE_BYTES_MAX

FILE_AND_NOTHING_ELSE: Mapping[str, str] = {}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "streamd.toml"


def from_text(file: Path, text: str, environ: Mapping[str, str] = FILE_AND_NOTHING_ELSE) -> Settings:
    file.write_text(text)
    return load(file=file, environ=environ, flags={})


def problems_of(file: Path, text: str, environ: Mapping[str, str] = FILE_AND_NOTHING_ELSE) -> list[str]:
    """The problems as shown to a person, without the file's folder."""
    with pytest.raises(ConfigError) as raised:
        from_text(file, text, environ)
    lines = str(raised.value).split("\n")
    assert lines == [str(problem) for problem in raised.value.problems]
    return [line.replace(f"{file.parent}/", "") for line in lines]


# The table


def test_defaults_without_any_source() -> None:
    assert load(file=None, environ={}, flags={}) == Settings()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_every_row_is_sound(row: object) -> None:
    row = next(own for own in ROWS if own == row)
    default = getattr(Settings(), row.attribute)
    assert row.section in SECTIONS
    assert row.key.partition(".")[0].isidentifier()
    if row.kind is Kind.LIST:
        assert row.parse(list(default)) == default
    elif row.kind in (Kind.TEXT, Kind.PATH):
        assert row.written == default == row.parse(row.written)
    else:
        assert row.parse(row.written) == default
    suffix = {Kind.DURATION: "_s", Kind.BYTES: "_bytes"}.get(row.kind, "")
    assert row.attribute.endswith(suffix) or row.attribute.endswith("_bytes_max")
    assert all(other is row or (other.flag, other.variable) != (row.flag, row.variable) for other in ROWS)


# The nouns that name a setting, and the adjectives in front of them. A text that begins with a verb, a pronoun or a
# reason doesn't say what is set; a new noun is a reason to make this list longer.
FIRST_WORDS = {
    *(
        "Address",
        "Addresses",
        "Audience",
        "Base",
        "Bytes",
        "Certificate",
        "Certificates",
        "Directory",
        "Environment",
        "Events",
        "Prefix",
    ),
    *(
        "File",
        "Format",
        "Frames",
        "Further",
        "Header",
        "Idle",
        "Interval",
        "Largest",
        "Lateness",
        "Least",
        "Longest",
        "Memory",
    ),
    *("Most", "Name", "Names", "Number", "Origins", "Path", "Private", "Proxies", "Public", "Right", "Shortest"),
    *("Share", "Silence", "Text", "Time", "Tolerance", "Treatment", "Whether"),
}


@pytest.mark.parametrize("row", (*ROWS, *UPSTREAM_ROWS, *ROUTE_ROWS), ids=lambda row: f"{row.section}-{row.key}")
def test_every_setting_says_what_it_sets_before_why(row: Row) -> None:
    assert row.meaning.split()[0].rstrip(",") in FIRST_WORDS
    assert row.text.endswith(".") and not row.meaning.endswith(".") and not row.why.endswith(".")
    assert not re.search(r"\b(what|who|whose|whoever|anybody|everybody|nobody|somebody|so (many|long))\b", row.text)
    if row.kind in (Kind.DURATION, Kind.BYTES, Kind.COUNT) and row.written not in ("0", "0s"):
        assert row.why, "a number has a reason"


def test_each_setting_has_a_name_in_file_environment_and_flags() -> None:
    row = next(row for row in ROWS if row.attribute == "commit_after_s")
    assert (row.key, row.flag, row.variable) == ("commit_after", "--commit-after", "STREAMD_COMMIT_AFTER")
    row = next(row for row in ROWS if row.attribute == "streams_auth")
    assert (row.key, row.flag, row.variable) == ("streams.auth", "--streams-auth", "STREAMD_STREAMS_AUTH")


def test_settings_are_frozen_and_may_be_chosen_freely_in_code() -> None:
    settings = Settings(ring_slots=3)
    assert dataclasses.replace(settings, commit_after_s=0.1).ring_slots == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.ring_slots = 4  # type: ignore[misc]


# Sources


def test_flags_win_over_environment_over_file_over_default(file: Path) -> None:
    file.write_text('heartbeat = "1s"\nidle_timeout = "1s"\ncommit_after = "1s"')
    environ = {"STREAMD_HEARTBEAT": "2s", "STREAMD_IDLE_TIMEOUT": "2s"}
    settings = load(file=file, environ=environ, flags={"heartbeat": "3s", "ring_slots": None})
    assert (settings.heartbeat_s, settings.idle_timeout_s, settings.commit_after_s) == (3.0, 2.0, 1.0)
    assert settings.ring_slots == 64


def test_lists_are_read_from_all_three_sources(file: Path) -> None:
    assert from_text(file, 'cors_origins = ["https://a", "https://b"]').cors_origins == ("https://a", "https://b")
    environ = {"STREAMD_CORS_ORIGINS": "https://a, https://b"}
    assert load(file=None, environ=environ, flags={}).cors_origins == ("https://a", "https://b")
    assert load(file=None, environ={}, flags={"cors_origins": ["https://c"]}).cors_origins == ("https://c",)


@pytest.mark.parametrize("origin", ["tauri://localhost", "chrome-extension://abcdefgh", "app://obsidian.md"])
def test_an_origin_of_any_scheme_can_be_allowed(file: Path, origin: str) -> None:
    assert from_text(file, f'cors_origins = ["{origin}"]').cors_origins == (origin,)


@pytest.mark.parametrize("text", ["*", "null", "file://", "tauri:localhost", "https://a/b"])
def test_a_text_that_is_no_exact_origin_is_refused(file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must be a list of origins"):
        from_text(file, f'cors_origins = ["{text}"]')


def test_a_file_has_values_of_each_kind(file: Path) -> None:
    settings = from_text(
        file,
        """
        head_timeout = 2.5
        event_bytes_max = "512KiB"
        ring_slots = 128
        policy = "close"
        ops_public = true
        listen = ["unix:/run/a.sock", "[::1]:0"]
        [streams]
        auth = "key"
        """,
    )
    assert (settings.head_timeout_s, settings.event_bytes_max, settings.ring_slots) == (2.5, 524288, 128)
    assert (settings.policy, settings.ops_public, settings.streams_auth) == ("close", True, "key")
    assert settings.listen == ("unix:/run/a.sock", "[::1]:0")


def test_a_wrong_value_is_refused_though_another_source_overrides_it() -> None:
    with pytest.raises(ConfigError, match="environment STREAMD_RING_SLOTS: ring_slots = '5': must be .* 32 to 128"):
        load(file=None, environ={"STREAMD_RING_SLOTS": "5"}, flags={"ring_slots": "64"})


def test_an_earlier_name_of_a_setting_is_taken_from_all_sources(file: Path) -> None:
    assert from_text(file, 'flush_interval = "50ms"').write_interval_s == 0.05
    assert load(file=None, environ={"STREAMD_FLUSH_INTERVAL": "20ms"}, flags={}).write_interval_s == 0.02
    assert load(file=None, environ={}, flags={}).write_interval_s == WORD_S


def test_a_setting_under_both_of_its_names_is_refused(file: Path) -> None:
    text = 'write_interval = "adaptive"\nflush_interval = "50ms"'
    said = "flush_interval = '50ms': is an earlier name of write_interval, which is set beside it"
    assert problems_of(file, text) == [f"streamd.toml:2: {said}"]
    both = {"STREAMD_WRITE_INTERVAL": "0", "STREAMD_FLUSH_INTERVAL": "50ms"}
    with pytest.raises(ConfigError, match="STREAMD_FLUSH_INTERVAL: is an earlier name of write_interval"):
        load(file=None, environ=both, flags={})


def test_a_wrong_flag_is_named_as_typed() -> None:
    with pytest.raises(
        ConfigError, match="^flag --ring-slots: ring_slots = '31': must be a whole number from 32 to 128$"
    ):
        load(file=None, environ={}, flags={"ring_slots": "31"})


def test_an_unknown_variable_is_refused() -> None:
    kubernetes = {
        "STREAMD_SERVICE_HOST": "10.0.0.1",
        "STREAMD_SERVICE_PORT_HTTP": "80",
        "STREAMD_PORT": "tcp://10.0.0.1:80",
        "STREAMD_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    others = {"STREAMD_CONFIG": "x", "STREAMD__WORKER": "1", "PATH": "/bin"}
    assert load(file=None, environ=kubernetes | others, flags={}) == Settings()
    with pytest.raises(ConfigError, match=r"^environment STREAMD_RING_SLOT: .*did you mean STREAMD_RING_SLOTS\?$"):
        load(file=None, environ={"STREAMD_RING_SLOT": "64"}, flags={})


# Refusals


def test_all_problems_of_a_file_are_reported_at_once_with_their_lines(file: Path) -> None:
    text = """\
        ring_slots = 5
        commit_afer = "1s"
        heartbeat = true
        retention_s = 3
        listen = [
            "0.0.0.0:80",
        ]
        [streams]
        auth = "tokn"
        retention = "1s"

        [[upstream]]
        url = "http://a"
        [[upstream]]
        url = "gpu:8000"
        max_inflight = 3
        [[route]]
        path = "/v1/*"
        policy = "drop"
        """
    assert problems_of(file, text, {"STREAMD_WORKERS": "0"}) == [
        "streamd.toml:1: ring_slots = 5: must be a whole number from 32 to 128",
        "streamd.toml:2: commit_afer = '1s': unknown key; did you mean commit_after?",
        "streamd.toml:3: heartbeat = true: must be a duration from 1s to 1h, or 0 (off)",
        "streamd.toml:4: retention_s = 3: unknown key; did you mean retention?",
        "streamd.toml:9: streams.auth = 'tokn': must be one of key, token",
        "streamd.toml:10: streams.retention = '1s': unknown key; "
        "retention belongs at the top of the file, above the first [table]",
        "streamd.toml:15: upstream.url = 'gpu:8000': must be http://HOST[:PORT][/BASE][?QUERY], https://…, "
        "unix:/PATH or http+unix://%2FPATH[/BASE], without user, and without a call's own path (/chat/completions)",
        "streamd.toml:16: upstream.max_inflight = 3: unknown key; did you mean inflight_max?",
        "streamd.toml:19: route.policy = 'drop': must be one of coalesce, drop_oldest, close",
        "environment STREAMD_WORKERS: workers = '0': must be a whole number from 1 to 64, or auto",
        f"streamd.toml:5: listen = ['0.0.0.0:80']: {LISTEN_WITHOUT_KEYS}",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = 1\nb = [1,\n", "streamd.toml:3: not TOML: Invalid value"),
        ("\n\nx == 3\n", "streamd.toml:3: not TOML: Invalid value"),
        ("x = 1\nx = 2\n", "streamd.toml:2: not TOML: Cannot overwrite a value"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_with_its_line(file: Path, text: str, problem: str) -> None:
    assert problems_of(file, text) == [problem]


@pytest.mark.parametrize("text", ["stall_timeout = " + "1" * 5000, "x = " + "[" * 100_000], ids=["digits", "brackets"])
def test_a_file_with_a_value_beyond_all_bounds_is_refused(file: Path, text: str) -> None:
    (problem,) = problems_of(file, text)
    assert problem.startswith("streamd.toml: not TOML that can be read: ")


def test_a_file_that_is_no_utf8_is_refused_with_its_line(file: Path) -> None:
    file.write_bytes(b"# fine\npolicy = '\xff'\n")
    with pytest.raises(ConfigError, match=r"toml:2: must be UTF-8$"):
        load(file=file, environ={}, flags={})


def test_a_missing_file_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"streamd.toml: No such file or directory$"):
        load(file=file, environ={}, flags={})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("streams = 3", "streamd.toml:1: streams = 3: unknown key"),
        ("upstream = 3", "streamd.toml:1: upstream = 3: must be tables: [[upstream]]"),
        ("[upstream]\nurl = 'http://a'", "streamd.toml:1: upstream = "),
        ('"streams.auth" = "key"', "streamd.toml:1: streams.auth = 'key': unknown key"),
        ("[listen]\nx = 1", "streamd.toml:1: listen = "),
        ("[a.b]\nx = 1", "streamd.toml:1: a = "),
    ],
)
def test_a_table_in_the_wrong_place_is_refused(file: Path, text: str, problem: str) -> None:
    (found,) = problems_of(file, text)
    assert found.startswith(problem)


# Relations

RELATIONS = [
    (Settings(target_bytes_max=2048, head_bytes_max=1024), "target_bytes_max", "at most head_bytes_max"),
    (Settings(body_bytes_max=10, bodies_bytes_max=9), "body_bytes_max", "at most bodies_bytes_max"),
    (Settings(ring_slots=64, log_events_max=63), "ring_slots", "at most log_events_max"),
    (Settings(detach_grace_s=301), "detach_grace_s", "at most detach_grace_max"),
    (Settings(retry_min_s=6), "retry_min_s", "at most retry_max"),
    (Settings(loop_lag_max_s=11), "loop_lag_max_s", "at most worker_stuck"),
    (Settings(ring_bytes_max=2**20), "log_bytes_max", "2 x ring_bytes_max"),
    (Settings(logs_bytes_max=2**19), "logs_bytes_max", "log_bytes_max + event_bytes_max"),
    (Settings(logs_bytes_max=2**20 + 2**19, event_bytes_max=2**20), "logs_bytes_max", "or 0"),
    (Settings(routes=(RouteOverride(path="/x", detach_grace_s=301),)), "routes", "/x"),
    (Settings(listen=("0.0.0.0:80",)), "listen", "insecure_public"),
    (Settings(listen=("[::1]:80", "[::1]:80")), "listen", "twice"),
    (Settings(listen=("[::1]:80",), admin="[::1]:80"), "admin", "not be an address of listen"),
    (Settings(listen=("[::1]:80",), metrics_listen="[::1]:80"), "metrics_listen", "not be an address of listen"),
    (Settings(admin="unix:/a", metrics_listen="unix:/a"), "metrics_listen", "or admin"),
    (Settings(metrics_listen="0.0.0.0:9464"), "metrics_listen", "metrics_public"),
    (Settings(metrics_listen="0.0.0.0:9464", keys_file="/keys"), "metrics_listen", "metrics_public"),
    (Settings(metrics_listen="gpu.example:9464", insecure_public=True), "metrics_listen", "metrics_public"),
    (Settings(tls_cert="c"), "tls_key", "together"),
    (Settings(tls_key="k"), "tls_cert", "together"),
    (Settings(proxy_protocol=True), "proxy_protocol", "trusted_proxies"),
    (Settings(streams_auth="token"), "streams_auth", "token_secret_file"),
    (Settings(streams_auth="token", token_secret_file="s"), "token_audience", "must be set for tokens"),
    (Settings(token_jwks_file="j"), "token_audience", "must be set for tokens"),
    (
        Settings(conns_per_address_max=8, conns_opening_per_address_max=9),
        "conns_opening_per_address_max",
        "at most conns_per_address_max",
    ),
    (Settings(cors_credentials=True), "cors_credentials", "cors_origins"),
]


@pytest.mark.parametrize(("settings", "attribute", "words"), RELATIONS, ids=lambda value: str(value)[:20])
def test_a_broken_relation_between_settings_is_refused(settings: Settings, attribute: str, words: str) -> None:
    ((found, allowed),) = relations(settings)
    assert found == attribute
    assert words in allowed


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(listen=("0.0.0.0:80",), insecure_public=True),
        Settings(listen=("0.0.0.0:80",), keys_file="/keys"),
        Settings(listen=("127.0.0.1:0", "127.0.0.1:0", "unix:/a")),
        Settings(metrics_listen="127.0.0.1:9464", admin="127.0.0.1:9465"),
        Settings(listen=("127.0.0.1:0",), admin="127.0.0.1:0", metrics_listen="127.0.0.1:0"),
        Settings(metrics_listen="0.0.0.0:9464", metrics_public=True),
        Settings(tls_cert="c", tls_key="k", proxy_protocol=True, trusted_proxies=("10.0.0.0/8",)),
        Settings(loop_lag_max_s=0, logs_bytes_max=2**30),
        Settings(event_bytes_max=2**26, log_bytes_max=2**20),
    ],
)
def test_settings_whose_relations_hold_are_accepted(settings: Settings) -> None:
    assert list(relations(settings)) == []


def test_a_collector_needs_the_packages_of_its_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '\notlp_endpoint = "http://127.0.0.1:4318"'
    assert from_text(file, text).otlp_endpoint == "http://127.0.0.1:4318"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "exporter" in name else object())
    (problem,) = problems_of(file, text)
    assert problem.startswith("streamd.toml:2: otlp_endpoint = 'http://127.0.0.1:4318': needs the packages of")
    assert "make install EXTRAS=otel, or pip install '.[otel]'" in problem

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert len(problems_of(file, text)) == 1 and not from_text(file, "").otlp_endpoint


def test_a_relation_names_the_source_of_the_value_to_change(file: Path) -> None:
    (problem,) = problems_of(file, '\nretry_min = "10s"')
    assert problem == "streamd.toml:2: retry_min = '10s': must be at most retry_max; the jitter runs between them"
    (problem,) = problems_of(file, 'ring_bytes_max = "1MiB"')
    assert problem.startswith("default: log_bytes_max = '1MiB': must be at least 2 x ring_bytes_max")


# Paths


def test_a_path_in_a_file_is_relative_to_the_file_and_elsewhere_to_the_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "keys").write_text("")
    assert from_text(file, 'keys_file = "keys"').keys_file == str(file.parent / "keys")
    monkeypatch.chdir(file.parent)
    assert load(file=None, environ={"STREAMD_KEYS_FILE": "keys"}, flags={}).keys_file == str(file.parent / "keys")
    assert from_text(file, 'state_dir = "not/there/yet"').state_dir == str(file.parent / "not/there/yet")


def test_a_setting_that_names_a_missing_file_is_refused(file: Path) -> None:
    (problem,) = problems_of(file, '\nkeys_file = "keys"')
    assert problem == "streamd.toml:2: keys_file = 'keys': must be a file that streamd can read; keys is missing"


def test_a_key_may_be_a_credential_of_systemd(file: Path) -> None:
    (file.parent / "gpu").write_text("sk-secret-1\n")
    text = "[[upstream]]\nurl = 'http://a'\nkey_file = 'credential:gpu'"
    assert from_text(file, text, {"CREDENTIALS_DIRECTORY": str(file.parent)}).upstreams[0].key == "sk-secret-1"
    (problem,) = problems_of(file, text)
    assert "LoadCredential=" in problem
    (problem,) = problems_of(file, text.replace("gpu", "../x"), {"CREDENTIALS_DIRECTORY": str(file.parent)})
    assert "the name of a credential" in problem


# Upstreams


def test_upstreams_are_read_from_the_file(file: Path) -> None:
    settings = from_text(
        file,
        """
        [[upstream]]
        url = "http://127.0.0.1:8000/v1/"
        [[upstream]]
        name = "hosted"
        url = "https://api.example/openai/v1"
        models = ["gpt-5", "o4"]
        inflight_max = 64
        pass_client_key = true
        headers = {X-Team = "red"}
        aliases = {fast = "gpt-5-mini"}
        """,
    )
    assert settings.upstreams == (
        UpstreamSettings(name="127.0.0.1:8000", url="http://127.0.0.1:8000"),
        UpstreamSettings(
            name="hosted",
            url="https://api.example/openai",
            models=("gpt-5", "o4"),
            inflight_max=64,
            pass_client_key=True,
            headers={"X-Team": "red"},
            aliases={"fast": "gpt-5-mini"},
        ),
    )
    hosted = settings.upstreams[1].origin
    assert (hosted.tls, hosted.host, hosted.port, hosted.base) == (True, "api.example", 443, "/openai")


def test_upstreams_in_a_variable_or_flag_replace_those_of_the_file(file: Path) -> None:
    file.write_text("[[upstream]]\nurl = 'http://a'")
    environ = {"STREAMD_UPSTREAM": "http://b:1/v1,http://[::1]:2"}
    assert [up.name for up in load(file=file, environ=environ, flags={}).upstreams] == ["b:1", "[::1]:2"]
    assert [up.url for up in load(file=file, environ=environ, flags={"upstream": ["http://c"]}).upstreams] == [
        "http://c"
    ]
    with pytest.raises(ConfigError, match="flag --upstream: upstream = 'x': must be http"):
        load(file=None, environ={}, flags={"upstream": ["x"]})
    with pytest.raises(
        ConfigError, match="flag --upstream: upstream.name = 'c:80': every upstream needs a name of its"
    ):
        load(file=None, environ={}, flags={"upstream": ["http://c", "http://c:80/v1"]})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "streamd.toml:2: upstream.url: every [[upstream]] needs a url"),
        (
            "url = 'http://a'\n[[upstream]]\nurl = 'http://a:80'",
            "streamd.toml:4: upstream.name = 'a:80': every upstream",
        ),
        ("url = 'http://a'\nname = 'a b'", "streamd.toml:4: upstream.name = 'a b': must be 1 to 128 letters"),
        ("url = 'http://a'\nca_file = 'streamd.toml'", "streamd.toml:2: upstream.ca_file = "),
        ("url = 'http://a'\nkey_env = 'K'\nkey_file = 'streamd.toml'", "streamd.toml:2: upstream.key_file = "),
        ("url = 'http://a'\nkey_env = 'K'", "streamd.toml:4: upstream.key_env = 'K': must hold one API key"),
        ("url = 'http://a'\nheaders = {Host = 'x'}", "streamd.toml:4: upstream.headers: must be a table of header"),
        ("url = 'http://a'\naliases = {x = 1}", "streamd.toml:4: upstream.aliases: must be a table of models"),
    ],
)
def test_a_wrong_upstream_is_refused(file: Path, text: str, problem: str) -> None:
    (found,) = problems_of(file, f"\n[[upstream]]\n{text}")
    assert found.startswith(problem)


def test_a_key_is_read_and_never_shown(file: Path) -> None:
    table = "[[upstream]]\nurl = 'http://a'\n"
    (file.parent / "key").write_text(" sk-secret-1 \n")
    by_file = from_text(file, f"{table}key_file = 'key'\nheaders = {{api-key = 'sk-secret-2'}}")
    by_variable = from_text(file, f"{table}key_env = 'GPU_KEY'", {"GPU_KEY": "sk-secret-1"})
    for settings in (by_file, by_variable):
        assert settings.upstreams[0].key == "sk-secret-1"
        assert "sk-secret" not in repr(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        "key = 'sk-secret-1'",
        "token = 'sk-secret-1'",
        "api_key = 'sk-secret-1'",
        "headers = {Authorization = 'Bearer sk-secret-1'}",
        'headers = {X = "sk-secret-1\\n"}',
        "headers = {X = 'sk-secret-1 é'}",
        "header = {X = 'sk-secret-1'}",
        "key_file = 'two-lines'",
    ],
)
def test_no_error_shows_a_key(file: Path, wrong: str) -> None:
    (file.parent / "two-lines").write_text("sk-secret-1\nsk-secret-2\n")
    (problem,) = problems_of(file, f"[[upstream]]\nurl = 'http://a'\n{wrong}")
    assert "sk-secret" not in problem


def test_no_error_shows_a_password(file: Path) -> None:
    (problem,) = problems_of(file, "[[upstream]]\nurl = 'http://me:sk-secret-1@gpu/'")
    assert "sk-secret" not in problem
    assert "gpu" in problem


def test_an_upstream_made_in_code_is_checked() -> None:
    with pytest.raises(Refused):
        UpstreamSettings(url="gpu:8000")


# Routes


def test_the_longest_matching_route_overrides_settings(file: Path) -> None:
    settings = from_text(
        file,
        """
        commit_after = "4s"
        [[route]]
        path = "/v1/*"
        policy = "close"
        [[route]]
        path = "/v1/responses"
        detach_grace = "60s"
        [[route]]
        path = "/v1/chat/*"
        heartbeat = 0
        """,
    )
    plain = settings.route("/other")
    assert (plain.policy, plain.commit_after_s, plain.detach_grace_s) == ("coalesce", 4.0, 0.0)
    assert settings.route("/v1/models") == dataclasses.replace(plain, policy="close")
    assert settings.route("/v1/responses") == dataclasses.replace(plain, detach_grace_s=60.0)
    assert settings.route("/v1/responses/x") == dataclasses.replace(plain, policy="close")
    assert settings.route("/v1/chat/completions") == dataclasses.replace(plain, heartbeat_s=0.0)
    assert settings.route("/v1/chat/completions") is settings.route("/v1/chat/other")
    assert dataclasses.replace(settings, commit_after_s=1.0).route("/v1/models").commit_after_s == 1.0


@pytest.mark.parametrize("text", ["", "path = ''", "path = '/a'\n[[route]]\npath = '/a'"])
def test_every_route_has_a_path_of_its_own(file: Path, text: str) -> None:
    (problem,) = problems_of(file, f"[[route]]\n{text}")
    assert "every [[route]] needs a path of its own" in problem


def test_rows_of_tables_have_their_fields() -> None:
    upstream = {field.name for field in dataclasses.fields(UpstreamSettings)} - {"key", "origin", "through"}
    assert {row.attribute for row in UPSTREAM_ROWS} == upstream
    assert {row.attribute for row in ROUTE_ROWS} == {field.name for field in dataclasses.fields(RouteOverride)}


@pytest.mark.parametrize(
    "content",
    [
        b"a = " + b"[" * 5000 + b"]" * 5000,
        b"a = " + b"{b=" * 3000 + b"1" + b"}" * 3000,
        b"body_bytes_max = " + b"9" * 5000,
        b"\x00\xff\xfe\x80" * 500,
        b'name = "\xe9"',
        b"#" * (FILE_BYTES_MAX + 1),
    ],
)
def test_a_file_of_any_content_is_refused_with_a_line(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load(file=file, environ={}, flags={})
    assert [str(problem).startswith(str(file)) for problem in raised.value.problems] == [True]


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing"])
def test_a_file_of_any_kind_is_refused_and_never_waited_for(file: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(ConfigError):
        load(file=file, environ={}, flags={})
    key_file = file.with_name("settings.toml")
    key_file.write_text(f'[[upstream]]\nname = "a"\nurl = "http://127.0.0.1:1"\nkey_file = "{file}"\n')
    with pytest.raises(ConfigError, match="key_file"):
        load(file=key_file, environ={}, flags={})
