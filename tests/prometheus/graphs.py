"""`make screenshots-prometheus`: graphs of a loaded daemon, as a real Prometheus shows them, into docs/screenshots.

Two inference servers serve for forty seconds, then gpu2 is killed for forty, and then it is back. The picture is that
of Prometheus' own page: Debian's package has it at /classic/graph, and it needs no other host.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "tests" / "browser")]

from accessible import FLAGS  # noqa: E402
from run import Prometheus, again_and_again, ask, metrics_of, until  # noqa: E402
from served import served, upstream  # noqa: E402
from tools import TOOLS, missing  # noqa: E402

PICTURE = PROJECT / "docs" / "screenshots" / "prometheus.png"
BYTES_MAX = 150_000
QUERIES = (
    "sum by (upstream) (rate(streamd_generation_tokens_total[10s]))",
    "histogram_quantile(0.95, sum by (upstream, le) (rate(streamd_time_to_first_token_seconds_bucket[10s])))",
    "streamd_upstream_up",
)
PART_S = 40.0  # with both servers, without gpu2, and again with both
CLIENTS = 6
# A page of three graphs on a screen: lower ones, without the fields to change them.
LOOK = """
.graph { min-height: 200px !important }
.expression_input { font-size: 13px !important }
.navbar, .prometheus_input_group, .expression_select, .execute_btn, .nav-tabs, [name=remove], .eval_stats
{ display: none !important }
"""


def draw(address: str) -> None:
    """Photograph the graphs of the last minutes."""
    from playwright.sync_api import sync_playwright

    graphs = {}
    for k, query in enumerate(QUERIES):
        graphs |= {f"g{k}.expr": query, f"g{k}.tab": "0", f"g{k}.range_input": f"{3 * PART_S:.0f}s"}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=TOOLS["chromium"].path(), args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 400})
        found = page.goto(f"http://{address}/classic/graph?{urllib.parse.urlencode(graphs)}")
        assert found is not None and found.ok, "this Prometheus has no /classic/graph: Debian's has"
        page.add_style_tag(content=LOOK)
        for k in range(len(QUERIES)):
            page.locator(".query_form").nth(k).evaluate("form => form.requestSubmit()")
        page.wait_for_timeout(3_000)  # the page has no sign of a graph that is drawn anew
        PICTURE.parent.mkdir(exist_ok=True)
        page.screenshot(path=PICTURE, full_page=True)
        browser.close()
    size_bytes = PICTURE.stat().st_size
    assert size_bytes < BYTES_MAX, f"{PICTURE.name} has {size_bytes} bytes"
    print(f"{PICTURE.relative_to(PROJECT)}: {size_bytes // 1024} KB")


def run(folder: Path) -> None:
    """Start all parts, kill a server, and draw."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    settings = folder / "streamd.toml"
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(upstream())
        settings.write_text(
            f'[[upstream]]\nname = "gpu1"\nurl = "{one}"\n[[upstream]]\nname = "gpu2"\nurl = "http://{place}"\n'
        )
        d = stack.enter_context(served("--metrics-listen", "127.0.0.1:0", "--config", str(settings)))
        with upstream("--listen", place):
            prometheus = Prometheus(folder, [metrics_of(d)])
            stack.callback(prometheus.end)
            for number in range(CLIENTS):
                work = (lambda pause: lambda: ask(d, "mock-llm", tokens=40, interval_ms=20, ttft_ms=pause))(
                    50 + 30 * number
                )
                stack.enter_context(again_and_again(work, 0.1))
            until(lambda: prometheus.query(QUERIES[1]), "a first token")
            time.sleep(PART_S)
        until(lambda: prometheus.query('streamd_upstream_up{upstream="gpu2"} == 0'), "an outage")
        time.sleep(PART_S)
        stack.enter_context(upstream("--listen", place))
        until(lambda: prometheus.query('streamd_upstream_up{upstream="gpu2"} == 1'), "an end of the outage")
        time.sleep(PART_S / 2)
        draw(prometheus.address)


def main() -> int:
    """Draw the picture, if all parts are here."""
    if absent := missing(("chromium", "playwright")):
        print(f"missing: {', '.join(absent)}; make test-tools installs them", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="streamd-prometheus-") as folder:
        run(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
