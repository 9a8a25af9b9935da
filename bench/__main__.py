"""python -m peakgpt.bench NAME: the same as `peakgpt bench NAME`."""

import sys

from peakgpt.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
