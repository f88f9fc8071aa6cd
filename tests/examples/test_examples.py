"""The examples that need no browser, run as in the documents."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from inprocess import Live, live, scripted
from tools import needs

from streamd.mockllm import MockOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
SLOW = MockOptions(interval_s=0.01, ttft_s=0, tokens=80)


def client(served: Live, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "python_client.py"), "--server", served.url, *options, "Hello."]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_python_client_loses_nothing() -> None:
    with live(SLOW, retry_min_s=0.01, retry_max_s=0.05) as served:
        whole = client(served)
        cut = client(served, "--lose-after", "5")
        assert (whole.returncode, cut.returncode) == (0, 0), cut.stderr
        assert cut.stdout == whole.stdout and cut.stdout.startswith("This is mock-llm speaking")
        assert "was dropped, as asked" in cut.stderr and whole.stderr == ""
        assert served.mock.stats.requests_total == 2


def test_the_python_client_survives_a_reset_anywhere() -> None:
    cuts = {0: 100, 1: 500, 2: 700, 3: 650, 4: 640}  # before the first event, within it, and later
    with live(SLOW, retry_min_s=0.01, retry_max_s=0.05) as served:
        whole = client(served)
        front = served.relay(cuts.get)
        command = [sys.executable, str(EXAMPLES / "python_client.py"), "--server", front.url, "Hello."]
        cut = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert cut.stdout == whole.stdout, cut.stderr
        assert len(front.down) > len(cuts)
        assert served.mock.stats.requests_total == 2


def test_the_python_client_finishes_a_stream_without_done() -> None:
    """The end may be a cut: the next request shows that the stream is complete."""
    with live(retry_min_s=0.01, retry_max_s=0.05) as served:
        served.fault("no-done")
        ran = client(served)
        assert (ran.returncode, ran.stdout) == (0, served.said("Hello.") + "\n")
        assert served.generations() == 1


def test_the_python_client_reports_failures() -> None:
    with live() as served:
        served.fault("status=400")
        refused = client(served)
        served.fault("break-fin=3")
        truncated = client(served)
    assert refused.returncode == 1 and "HTTP 400: mock-llm was told to answer 400." in refused.stderr
    assert truncated.returncode == 1 and truncated.stdout == "This is mock" and "ended before" in truncated.stderr


@needs("curl")
def test_curl_reads_resumes_and_stops_a_stream() -> None:
    # LEAVE_AFTER is long enough for a slow start of curl, and twice LEAVE_AFTER ends well before the generation.
    with live(MockOptions(interval_s=0.03, ttft_s=0, tokens=80)) as served:
        ran = subprocess.run(
            ["sh", str(EXAMPLES / "curl.sh"), served.url],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LEAVE_AFTER": "0.8"},
        )
        first, rest, nothing, stopped = (part.splitlines() for part in ran.stdout.split("== ")[1:])
        whole = served.said("Tell me about streams.")
        assert served.generations() == 2
    assert ran.stderr == ""
    assert first[1] and rest[1] and json.loads(f'"{first[1]}{rest[1]}"') == whole
    assert nothing[1] == "204" and stopped[1] == "204"
    assert '"code":"cancelled"' in stopped[3] and stopped[4] == "18"  # CURLE_PARTIAL_FILE


# Runs generate() of streamd.js without waiting between its tries, and prints each state and what it throws.
ASKING = """
const { setTimeout: later } = globalThis; // the waits are 1 s and 2 s; the library has other timers
globalThis.setTimeout = (call, ms, ...more) => later(call, ms === 1000 || ms === 2000 ? 0 : ms, ...more);
const { generate } = await import(process.argv[1]);
try {
  for await (const said of generate(process.argv[2], "/v1/chat/completions", { model: "m" })) console.log(said.state);
} catch (error) {
  console.log(error.message);
}
"""


def asking(url: str) -> list[str]:
    command = ["node", "--input-type=module", "--eval", ASKING, str(EXAMPLES / "streamd.js"), url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stderr == ""
    return ran.stdout.splitlines()


@needs("node")
def test_the_script_says_that_nothing_answers_at_an_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    *states, last = asking(url)
    assert states == ["reconnecting", "reconnecting"] and last.startswith(f"Nothing answers at {url}: ")


# Leaves the loop after the first text, and lives on as a page does.
LEAVING = """
const { generate } = await import(process.argv[1]);
const body = { model: "m", messages: [{ role: "user", content: "Hello" }] };
for await (const said of generate(process.argv[2], "/v1/chat/completions", body, { graceS: 0 })) if (said.text) break;
setInterval(() => {}, 1000);
"""


@needs("node")
def test_a_page_that_leaves_its_loop_is_no_reader_any_longer() -> None:
    with live(MockOptions(interval_s=0.02, ttft_s=0, tokens=1_000_000)) as served:
        command = ["node", "--input-type=module", "--eval", LEAVING, str(EXAMPLES / "streamd.js"), served.url]
        with subprocess.Popen(command) as page:
            try:
                served.until(aborted=1, open=0)
            finally:
                page.kill()


@needs("node")
def test_the_script_says_that_another_server_answers() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi"
    with scripted(lambda: iter([head])) as url:
        assert asking(url) == [f"{url} answers with text/html: is that streamd?"]
