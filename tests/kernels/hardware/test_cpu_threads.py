"""The number of threads of a kernel: quotas of control groups, read from files like those of Linux."""

import pytest
import torch

from peakgpt.kernels.doctor import Diagnosis
from peakgpt.kernels.hardware.cpu_threads import cpu_quota, limited_threads, torch_threads
from peakgpt.kernels.hardware.datasheet import Peaks
from peakgpt.kernels.hardware.device import describe

# The root of a file system: file -> text, and the expected quota.
V1 = "4:memory:/job\n3:cpu,cpuacct:/job/part\n0::/\n"
CASES = {
    "no control groups": ({}, None),
    "version 2": (
        {
            "proc/self/cgroup": "0::/user.slice/job",
            "sys/fs/cgroup/user.slice/job/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
        },
        1.5,
    ),
    "version 2, a smaller quota above": (
        {
            "proc/self/cgroup": "0::/user.slice/job",
            "sys/fs/cgroup/user.slice/job/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "100000 50000\n",
        },
        2.0,
    ),
    "version 2, a container that sees its group as the root": (
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
        0.5,
    ),
    "version 2 without a limit": (
        {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "max 100000\n"},
        None,
    ),
    "version 2, a group outside of what the container sees": (
        {"proc/self/cgroup": "0::/../../job", "sys/fs/cgroup/cpu.max": "300000 100000\n"},
        3.0,
    ),
    "version 1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/job/part/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/job/part/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "version 1, a container whose group is mounted as the root": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "20000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "10000\n",
        },
        2.0,
    ),
    "version 1 without a limit": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_smallest_quota_of_the_control_groups_counts(name, tmp_path):
    files, expected = CASES[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert cpu_quota(tmp_path) == expected


@pytest.mark.parametrize("quota, most", [(0.2, 1), (1.0, 1), (1.5, 2), (2.0, 2), (64.0, 4)])
def test_a_kernel_has_at_most_one_thread_for_each_cpu_of_the_quota(quota, most, threads):
    limited = limited_threads(quota)
    for count in (1, 4):
        threads(count)
        assert limited() == min(count, most)


def test_without_a_quota_a_kernel_has_the_threads_of_torch():
    assert limited_threads(None) is torch.get_num_threads


def test_torch_threads_restores_the_number_after_an_error(threads):
    threads(3)
    with pytest.raises(RuntimeError), torch_threads(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("quota, text", [(1.5, "1.5"), (None, "none")])
def test_doctor_names_the_quota(quota, text):
    report = str(Diagnosis(describe("cpu"), Peaks({"float32": 1e11}, 1e10, "", 1e10), None, {}, [], 2, quota))
    assert f"threads of a kernel: 2, quota of CPUs: {text}\n" in report
