"""The static check: compile every kernel and tile row for GPUs that are not installed, and check the machine code.

Triton compiles without a device, and its wheel contains NVIDIA's disassembler. So registers, spills, shared memory and
matrix instructions are known before a kernel first runs. `peakgpt aot` prints them. A case fails if its kernel

- spills registers to local memory,
- needs more shared or tensor memory than the chip has,
- stores nothing: ptxas compiles an impossible kernel to a bare trap,
- starts early (overlap.py) and accesses memory before it has waited for the previous kernels,
- lacks the matrix instruction of its chip although one is expected.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peakgpt.kernels import gpu
from peakgpt.kernels.command_line import Parser
from peakgpt.kernels.core import backends
from peakgpt.kernels.strict_json import dumps

if TYPE_CHECKING:  # the module imports Triton, which must not happen before `_worker` runs
    from peakgpt.kernels.gpu.launch import AotCase

WORKERS = 2


class Target(NamedTuple):
    """A chip: the key of its tile rows, its shared memory a block, and regular expressions of its matrix instructions.

    Limits: CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA 3 ISA, LDS size.
    """

    arch: str
    shared_bytes: int
    matrix: str
    narrow: str = r"\bHMMA\b"  # the instruction for tiles with fewer than 64 rows


TARGETS = {
    "sm_80": Target("sm_80", 163 * 1024, r"\bHMMA\b"),
    "sm_90": Target("sm_90", 227 * 1024, r"\bHGMMA\b"),
    "sm_100": Target("sm_100", 227 * 1024, r"\bUTC\w*MMA\b"),
    "gfx942": Target("gfx942", 64 * 1024, r"\bv_mfma_", r"\bv_mfma_"),
    "sm_86": Target("sm_86", 99 * 1024, r"\bHMMA\b"),
    "sm_120": Target("sm_86", 99 * 1024, r"\bHMMA\b"),
}
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TENSOR_MEMORY_COLUMNS = 512  # sm_100
# Stores in SASS, PTX and AMD's assembly.
_STORE = r"\b(STG|ST\.E|UTMASTG|UTMAREDG|RED|REDG|ATOMG?|st\.global|(global|buffer|flat)_(store|atomic)\w*)\b"
# Accesses to memory in PTX, except prefetches.
_ACCESS = r"\b((ld|st|atom|red)\.(global|volatile|relaxed|acquire|release)|cp\.(async|reduce)\b(?!\.bulk\.prefetch))"


@dataclass(frozen=True)
class Row:
    """The resources that a compiled case uses. `failure` is None if the case passes."""

    op: str
    kernel: str
    case: str
    target: str
    warps: int
    stages: int
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    shared_limit_bytes: int = 0
    matrix_instructions: int = 0  # counted if AotCase.matmul or if the kernel has a stack
    failure: str | None = None


def check_case(op: str, case: AotCase, target: str) -> Row:
    """Compile one case for one target and check its machine code.

    Args:
        op: name in the report.
        case: its kernel must have been imported without TRITON_INTERPRET.
        target: a key of TARGETS.
    """
    chip = TARGETS[target]
    matrix = chip.narrow if case.narrow else chip.matrix
    row = {"op": op, "kernel": case.kernel.__name__, "case": case.label, "target": target,
           "warps": case.tile.warps, "stages": case.tile.stages, "shared_limit_bytes": chip.shared_bytes}  # fmt: skip
    try:
        compiled = _compile(case, target)
    except Exception as error:  # the compiler raises many types; the row reports the message
        return Row(**row, failure=f"does not compile: {(str(error).strip() or repr(error)).splitlines()[-1]}")
    code, registers, spills = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled, case.matmul)
    accesses_early = bool(case.constexprs.get("OVERLAP")) and _accesses_before_wait(compiled.asm["ptx"])
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    result = Row(**row, registers=registers, spills=spills, shared_bytes=compiled.metadata.shared,
                matrix_instructions=len(re.findall(matrix, code)))  # fmt: skip
    failures = {
        f"spills: {spills} instructions": spills > 0,
        f"shared memory: {result.shared_bytes} bytes, the chip has {chip.shared_bytes}": (
            result.shared_bytes > chip.shared_bytes
        ),
        f"tensor memory: {tensor_memory} columns, the chip has {TENSOR_MEMORY_COLUMNS}": (
            tensor_memory > TENSOR_MEMORY_COLUMNS
        ),
        "accesses memory before it waits for the previous kernels": accesses_early,
        "stores nothing, like a bare trap": not re.search(_STORE, code),
        f"no matrix instruction ({matrix})": case.matmul and not result.matrix_instructions,
    }
    failure = "; ".join(reason for reason, failed in failures.items() if failed)
    return Row(**{**asdict(result), "failure": failure or None})


def _compile(case: AotCase, target: str):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if set(names) != set(types) or set(case.signature) & set(case.constexprs):
        raise ValueError(f"{case.kernel.__name__} {case.label}: got {sorted(types)}, expected {sorted(names)}")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] in "*i" and types[n] != "i1"}
    source = ASTSource(case.kernel, {n: types[n] for n in names}, constexprs=dict(case.constexprs), attrs=aligned)
    chip = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source, target=chip, options={"num_warps": case.tile.warps, "num_stages": case.tile.stages})


def _nvidia(compiled, matmul: bool) -> tuple[str, int, int]:
    """Return the code, registers a thread, and the number of instructions that access local memory (spills).

    The code is SASS if matrix instructions or spills have to be counted, else PTX. This saves the 0.35 s in which
    nvdisasm starts: cuobjdump reports the size of the stack, and without a stack there are no spills.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _read(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        stack, registers = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "REG"))
        if not matmul and not stack:
            return compiled.asm["ptx"], registers, 0
        code = _read(knobs.nvidia.nvdisasm.path, "-c", file.name)
    return code, registers, len(re.findall(r"\b(?:LDL|STL)\b", code)) or int(stack > 0)


def _accesses_before_wait(ptx: str) -> bool:
    """Return whether a kernel that starts early (overlap.py) reads or writes memory before its wait instruction."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    return not wait or re.search(_ACCESS, before) is not None


def _amd(compiled) -> tuple[str, int, int]:
    """Return the code, vector registers a thread, and the number of spilled registers."""
    code = compiled.asm["amdgcn"]
    figure = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s*(\d+)", code)}
    return code, figure["vgpr_count"], figure["vgpr_spill_count"]


def _read(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- all cases, in worker processes ----


def ops() -> tuple[str, ...]:
    """Return the names of the modules below this package that define `aot_cases`; nothing is imported."""
    files = Path(gpu.__path__[0]).rglob("*.py")
    return tuple(sorted(f.stem for f in files if re.search(r"^(def )?aot_cases\b", f.read_text("utf-8"), re.MULTILINE)))


def check(targets: Sequence[str], names: Sequence[str], *, hot: bool = False) -> Iterator[Row]:
    """Yield a row for every case (or every hot case) of the ops `names` and the targets, sorted by op, then by target.

    The kernels are compiled in WORKERS new processes, always without TRITON_INTERPRET.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_worker) as pool:
        jobs_of = pool.map(_jobs, [(op, t, hot) for op in names for t in targets])
        yield from pool.map(_check_job, [job for jobs in jobs_of for job in jobs])


def _worker() -> None:
    # triton.jit reads the variable when it decorates a kernel; kernels of the interpreter cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)


def _cases(op: str, target: str) -> list[AotCase]:
    return list(importlib.import_module(backends.module_names("gpu")[op]).aot_cases(TARGETS[target].arch))


def _jobs(job: tuple[str, str, bool]) -> list[tuple[str, str, int]]:
    op, target, hot = job
    return [(op, target, i) for i, case in enumerate(_cases(op, target)) if case.hot or not hot]


def _check_job(job: tuple[str, str, int]) -> Row:
    op, target, index = job
    return check_case(op, _cases(op, target)[index], target)


# ---- command line ----

_LINE = (
    "{op:21} {kernel:29} {case:24} {target:6} {warps:>5} {stages:>6} "
    "{registers:>4} {spills:>6} {shared:>10} {matrix:>6}  {verdict}"
)


def line(row: Row) -> str:
    """Format one row of the table."""
    shared = f"{row.shared_bytes / 1024:.0f}/{row.shared_limit_bytes // 1024} KB"
    verdict = f"FAIL {row.failure}" if row.failure else "ok"
    return _LINE.format(**asdict(row), shared=shared, matrix=row.matrix_instructions, verdict=verdict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `peakgpt aot`."""
    parser.add_argument("--target", action="append", choices=TARGETS, help=f"default: {', '.join(DEFAULT_TARGETS)}")
    parser.add_argument("--op", action="append", choices=ops(),
                        help="an op, or another module of kernels/gpu with kernels; default: all")  # fmt: skip
    parser.add_argument("--hot", action="store_true", help="only the rows that decide the speed, as in the fast tests")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the table. Return 1 if a row fails, else 0."""
    rows = []
    if not args.json:
        titles = {name: name for name in Row.__dataclass_fields__}
        print(_LINE.format(**{**titles, "registers": "regs"}, shared="shared", matrix="matrix", verdict="verdict"))
    for row in check(args.target or DEFAULT_TARGETS, args.op or ops(), hot=args.hot):
        rows.append(row)
        if not args.json:
            print(line(row), flush=True)
    if args.json:
        print(dumps([asdict(row) for row in rows], indent=1))
    failed = sum(row.failure is not None for row in rows)
    print(f"{len(rows)} rows, {failed} failed", file=sys.stderr)
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m peakgpt.kernels.gpu.static_check`."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
