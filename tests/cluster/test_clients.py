"""Clients that others made, as readers: they start at one node, lose it, and go on at the other with every event."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterator

import openai
import pytest

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from counting_upstream import Generation
from nodes import Nodes, nodes
from patient import Ending, Event
from served import WAIT_S
from tools import TOOLS, needs
from way import Way

pytestmark = pytest.mark.cluster


def sdk(n: Nodes, node: str) -> openai.OpenAI:
    url = f"http://127.0.0.1:{n[node].port}/v1"
    return openai.OpenAI(
        base_url=url, api_key="none", http_client=openai.DefaultHttpxClient(verify=False), max_retries=0
    )


def chat(client: openai.OpenAI, tag: str, **fields: str) -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    return client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": tag}], stream=True, extra_headers=fields
    )


def texts(generation: Generation, first: int = 1) -> str:
    return "".join(f"{generation.tag}.{number} " for number in range(first, generation.made + 1))


def test_the_openai_sdk_goes_on_at_the_other_node() -> None:
    with nodes(counted=True) as n, sdk(n, "a") as at_a, sdk(n, "b") as at_b:
        assert n.source is not None
        generation = n.source.generation("sdk")
        stream = chat(at_a, "sdk", **{"X-Stream-Detach-Grace": "60"})
        stream_id = stream.response.headers["x-stream-id"]
        read = "".join(next(stream).choices[0].delta.content or "" for _ in range(20))
        stream.close()
        rest = chat(at_b, "sdk", **{"Last-Event-ID": f"{stream_id}:20"})
        first = next(rest)
        generation.end()
        chunks = [first, *rest]
        read += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert read == texts(generation) and chunks[-1].choices[0].finish_reason == "stop"


def test_the_openai_sdk_is_told_that_the_node_is_lost() -> None:
    with nodes(counted=True) as n, sdk(n, "b") as at_b:
        first = n.begin("a")
        n.until_read([first])
        stream = chat(at_b, first.generation.tag, **{"Last-Event-ID": f"{first.stream_id}:1"})
        read = next(stream).choices[0].delta.content or ""
        n.kill("a")
        with pytest.raises(openai.APIError) as raised:
            for chunk in stream:
                read += chunk.choices[0].delta.content or ""
        assert raised.value.code == "node_lost"
        assert texts(first.generation, 2).startswith(read) and read


FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")

# The page tells each event to the server that it came from, one after the other.
PAGE = b"""<!DOCTYPE html><script>
const tell = (told) => fetch("/", {method: "POST", body: JSON.stringify(told)});
const source = new EventSource(location.hash.slice(1));
let told = Promise.resolve();
source.onmessage = (event) => { told = told.then(() => tell([event.lastEventId, event.data])); };
source.onerror = () => { if (source.readyState === EventSource.CLOSED) told = told.then(() => tell(null)); };
</script>"""


class PageServer(http.server.ThreadingHTTPServer):
    """Serves the page, and hears what it tells."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Page)
        self.told: queue.Queue[list[str] | None] = queue.Queue()
        self.origin = f"http://127.0.0.1:{self.server_address[1]}"


class _Page(http.server.BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE)

    def do_POST(self) -> None:
        self.server.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def browsing(url: str) -> Iterator[None]:
    """A browser that shows this page."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        command = [TOOLS["chromium"].path(), "--headless", *FLAGS, f"--user-data-dir={folder}", url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                yield
            finally:
                browser.kill()


@needs("chromium")
def test_an_event_source_goes_on_at_the_other_node_and_stops_at_the_end() -> None:
    """A balancer sends its connections to one node, and then to the other."""
    with contextlib.ExitStack() as stack:
        pages = stack.enter_context(PageServer())
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        stack.callback(pages.shutdown)
        n = stack.enter_context(nodes("--cors-origins", pages.origin, "--retry-min", "1s", counted=True))
        balancer = stack.enter_context(Way(n["a"].port).serving())
        first = n.begin("a")
        reader = n.reader_of(first, "b")
        url = f"http://127.0.0.1:{balancer.port}/v1/streams/{first.stream_id}"
        stack.enter_context(browsing(f"{pages.origin}/#{url}"))
        for number in itertools.count():
            told = pages.told.get(timeout=WAIT_S)
            if told is None:
                break
            reader.take(Event(told[0], "", told[1]))
            assert not reader.wrong
            if number == 20:
                balancer.far_port = n["b"].port
                balancer.reset()
            elif number == 40:
                first.generation.end()
        assert reader.ending is Ending.DONE and reader.seq == first.generation.made + 2
