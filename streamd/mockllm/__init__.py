"""mock-llm: a synthetic upstream that speaks OpenAI's and Anthropic's HTTP APIs, for demos, tests and load.

In a test: `mock = await start_mock(loop, options=MockOptions(interval_s=0, ttft_s=0))`, then `mock.url`, `mock.stats`,
`await mock.stats.until(lambda stats: stats.aborted == 1)`, `mock.close()`.
"""

from streamd.mockllm.command import add_arguments, run
from streamd.mockllm.faults import Faults, parse_faults
from streamd.mockllm.options import MockOptions
from streamd.mockllm.server import MockServer, start_mock
from streamd.mockllm.stats import Seen, Stats

__all__ = ["Faults", "MockOptions", "MockServer", "Seen", "Stats", "add_arguments", "parse_faults", "run", "start_mock"]
