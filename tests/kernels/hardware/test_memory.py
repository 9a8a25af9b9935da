"""Memory that a process can still take: of the system with its swap, within the limits of control groups."""

import mmap
import sys

import pytest
import torch

from peakgpt.kernels.hardware.memory import available_bytes, peak_bytes, reset_peak, used_bytes

CPU = torch.device("cpu")
GIB = 1 << 30


def system(root, *, available_gib=16, swap_gib=0, groups=None, cgroup="0::/\n"):
    """Write the files of a system: `groups` are folder -> {file: content} below sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: 99 kB\nMemAvailable: {available_gib << 20} kB\nSwapFree: {swap_gib << 20} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    for folder, files in (groups or {}).items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (path / name).write_text(f"{text}\n")
    return root


def limit(gib, used_gib, *, cache_gib=0, swap="max", swap_used=0):
    return {"memory.max": gib if gib == "max" else gib * GIB, "memory.current": used_gib * GIB,
            "memory.stat": f"anon 5\ninactive_file {cache_gib * GIB}", "memory.swap.max": swap,
            "memory.swap.current": swap_used}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected_gib"),
    [
        ({}, 16),
        ({"swap_gib": 4}, 20),
        ({"groups": {"": limit(8, 3)}}, 5),
        ({"groups": {"": limit(8, 3, cache_gib=2)}}, 7),  # cached files are dropped first
        ({"groups": {"": limit("max", 3)}}, 16),
        ({"groups": {"": limit(64, 3)}}, 16),
        ({"groups": {"": limit(8, 9)}}, 0),
        ({"groups": {"": limit(8, 3)}, "swap_gib": 4}, 9),
        ({"groups": {"": limit(8, 3, swap=0)}, "swap_gib": 4}, 5),  # a container without swap
        ({"groups": {"a/b": limit("max", 1), "a": limit(6, 2)}, "cgroup": "0::/a/b\n"}, 4),  # a limit of the parent
        ({"groups": {"": limit(6, 2)}, "cgroup": "0::/not/visible\n"}, 4),  # the path outside of the container
        ({"groups": {"memory/job": {"memory.limit_in_bytes": 4 * GIB, "memory.usage_in_bytes": GIB,
                                    "memory.stat": f"total_inactive_file {GIB}"}},
          "cgroup": "5:cpu:/x\n4:memory:/job\n"}, 4),
    ],
)  # fmt: skip
def test_available_memory_is_the_least_of_system_and_control_groups(tmp_path, options, expected_gib):
    root = system(tmp_path, **options)
    assert available_bytes(CPU, with_swap=True, root=root) == expected_gib * GIB
    if not options.get("swap_gib"):
        assert available_bytes(CPU, root=root) == expected_gib * GIB


def test_swap_counts_only_if_asked_for(tmp_path):
    assert available_bytes(CPU, root=system(tmp_path, swap_gib=4)) == 16 * GIB


def test_a_system_without_these_files_has_an_answer(tmp_path):
    assert available_bytes(CPU, root=tmp_path) > 0


def test_the_peak_is_counted_anew_after_a_reset():
    """With maps of their own: an earlier test may have made malloc keep freed pages."""
    if sys.platform != "linux":
        pytest.skip("only Linux counts the peak of a part of a process")
    with mmap.mmap(-1, 64 << 20) as pages:
        pages.write(b"x" * len(pages))
    reset_peak(CPU)
    before = peak_bytes(CPU)
    assert before < used_bytes(CPU) + (16 << 20)
    with mmap.mmap(-1, 96 << 20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
    assert (80 << 20) < peak_bytes(CPU) - before < (112 << 20)
