"""`python -m streamd.mockllm` is `streamd mock-llm`."""

import argparse
import sys

from streamd.mockllm.command import add_arguments, run

parser = argparse.ArgumentParser(prog="streamd mock-llm")
add_arguments(parser)
sys.exit(run(parser.parse_args()))
