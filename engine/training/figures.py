"""Figures of a run as text, in one way everywhere: an MFU that is printed agrees with its tokens/s within 1 %."""

from __future__ import annotations


def rate_text(rate: float) -> str:
    """Return a rate with at least four digits, such as "12,345" and "12.35"."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def speed_text(tokens_per_s: float) -> str:
    """Return tokens per second, such as "12,345 tok/s"."""
    return f"{rate_text(tokens_per_s)} tok/s"


def percent_text(share: float) -> str:
    """Return a share, 0..1, in percent with three digits, such as "12.3 %" and "0.123 %"."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 99.95 else f"{percent:#.3g} %"


def significant(value: float, digits: int = 6) -> float:
    """Round to significant digits, for a file: a small MFU keeps its precision."""
    return float(f"{value:.{digits}g}")


def duration_text(seconds: float) -> str:
    """Return a time such as "4.2 s", "3 min 5 s" and "2 h 7 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def bytes_text(count: float) -> str:
    """Return bytes with three digits, such as "1.25 GiB" and "312 MiB"."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
