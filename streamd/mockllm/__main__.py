"""`python -m streamd.mockllm`: the mock by itself."""

import argparse
import sys

from streamd.mockllm.command import add_arguments, run

parser = argparse.ArgumentParser(prog="streamd mock-llm")
add_arguments(parser)
sys.exit(run(parser.parse_args()))
