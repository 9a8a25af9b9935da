"""python -m peakgpt.bench NAME: the same as `peakgpt bench NAME`."""

import sys

from peakgpt.bench.command import add_arguments, run
from peakgpt.kernels.command_line import Parser

parser = Parser(prog="python -m peakgpt.bench", description="Measure peakgpt against other engines.")
add_arguments(parser)
try:
    sys.exit(run(parser.parse_args()))
except (ValueError, OSError) as error:
    print(f"peakgpt bench: error: {error}", file=sys.stderr)
    sys.exit(2)
