"""`python -m peakgpt` is the `peakgpt` command."""

from peakgpt.cli import main

raise SystemExit(main())
