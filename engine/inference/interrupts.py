"""Which exceptions end the program. Every other exception belongs to the request that raises it.

A panic of a Rust library (`pyo3_runtime.PanicException`, which the package `tokenizers` raises for some inputs) is a
BaseException, not an Exception. The class cannot be imported. So code that isolates requests catches BaseException
after these three.
"""

INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)
