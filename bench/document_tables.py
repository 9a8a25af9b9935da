"""The tables of README.md and docs/ that show results, as data: which groups, which contenders, which columns.

`bench readme` fills them in. A cell is a text, or a function of `find`, which returns the rows of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peakgpt.bench.chosen_runs import ANY, Group, Shown
from peakgpt.bench.schema import Result, comparable
from peakgpt.bench.timing import ratio

Find = Callable[[Group], Shown]
Cell = str | Callable[[Find], str]
OURS = "peakgpt"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a document.

    Args:
        name: in the comments around the table.
        document: path from the root of the repository.
        headings, rows: texts and cells.
    """

    name: str
    document: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


# ---- cells


def tokens_per_s(group: Group, contender: str = OURS) -> Cell:
    return lambda find: f"{find(group).rows[contender].tokens_per_s:,.0f}"


def milliseconds(group: Group, contender: str = OURS) -> Cell:
    def text(find: Find) -> str:
        value = 1e3 * find(group).rows[contender].median_s
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return text


def share_of_peak(group: Group, contender: str = OURS) -> Cell:
    def text(find: Find) -> str:
        share = find(group).rows[contender].flops_fraction
        return "" if share is None else f"{100 * share:.1f} %"

    return text


def note(group: Group, contender: str = OURS) -> Cell:
    return lambda find: find(group).rows[contender].note


def memory_ratio(group: Group, other: str, ours: str = OURS) -> Cell:
    """Peak memory of our process over that of another contender."""

    def text(find: Find) -> str:
        a, b = (find(group).rows[name].memory_bytes for name in (ours, other))
        return f"{a / b:.2f}" if a and b else ""

    return text


def against(group: Group, other: str, ours: str = OURS) -> Cell:
    """How many times as fast ours is, by round, with the 95 % interval."""
    return lambda find: _ratio_text(find(group).rows[ours], find(group).rows[other])


def fastest(group: Group, others: Sequence[str], ours: str = OURS) -> Cell:
    """The fastest of the others in a like weight format, and its tokens/s."""

    def text(find: Find) -> str:
        row = _fastest(find(group), others, ours)
        return f"{row.contender} {row.tokens_per_s:,.0f}"

    return text


def against_fastest(group: Group, others: Sequence[str], ours: str = OURS) -> Cell:
    return lambda find: _ratio_text(find(group).rows[ours], _fastest(find(group), others, ours))


def _fastest(shown: Shown, others: Sequence[str], ours: str) -> Result:
    like = [shown.rows[name] for name in others if comparable(shown.rows[ours], shown.rows[name])]
    return min(like, key=lambda row: row.median_s)


def _ratio_text(ours: Result, other: Result) -> str:
    if not comparable(ours, other):
        raise ValueError(f"{ours.contender} and {other.contender} have unlike weight formats or other rounds")
    return ratio(other.timing(), ours.timing()).text


# ---- groups

GPT2 = {"n_layer": 12, "n_embd": 768}
TRAINING = {  # contender -> its name in a table
    "peakgpt": "**peakgpt**",
    "compile, tuned malloc": "torch.compile, allocator tuned by hand",
    "eager, tuned malloc": "PyTorch eager, allocator tuned by hand",
    "eager": "PyTorch eager",
}
TRAIN = {
    dtype: Group(bench="train", dtype=dtype, case={"batch": 4, "tokens": 256, **GPT2}, contenders=tuple(TRAINING))
    for dtype in ("bfloat16", "float32")
}
# Weight format -> other engines that a complete run has, and the format's name in a table.
ENGINES = {
    "bfloat16": ("llama.cpp", "openvino", "transformers", "eager"),
    "int8": ("llama.cpp", "openvino", "onnxruntime"),
    "int4": ("llama.cpp",),
}
FORMATS = {"bfloat16": "bfloat16", "int8": "8 bits", "int4": "4 bits by 32"}
DECODE = {
    (dtype, streams): Group(
        bench="decode", dtype=dtype, case={**GPT2, "prompt": ANY, "tokens": ANY, "batch": streams},
        contenders=(*((OURS, "peakgpt by 32") if dtype == "int4" else (OURS,)), *engines),
    )
    for streams in (1, 8) for dtype, engines in ENGINES.items()
}  # fmt: skip
PREFILL_ENGINES = {"bfloat16": ("openvino", "transformers", "eager", "compile"), "int8": ("openvino", "ctranslate2")}
PREFILL = {
    dtype: Group(bench="prefill", dtype=dtype, case={"tokens": 512, **GPT2}, contenders=(OURS, *engines))
    for dtype, engines in PREFILL_ENGINES.items()
}
PATCHED = (OURS, "transformers", "transformers, tuned malloc")
PATCH = [
    (
        f"{text}, {dtype}",
        Group(bench="patch", dtype=dtype, contenders=PATCHED,
              case={"model": model, "work": work, "batch": ANY, "tokens": ANY}),
    )
    for model, work, text in (
        ("gpt2", "train", "GPT-2 124M, training"),
        ("bert-base", "train", "BERT-base, training on 15 % of the tokens"),
        ("pythia-160m", "train", "Pythia-160M size, training"),
        ("gpt2", "generate", "GPT-2 124M, greedy decoding"),
    )
    for dtype in ("bfloat16", "float32")
]  # fmt: skip
GEMM = {  # contender -> its name in a table
    "peakgpt": "bfloat16",
    "peakgpt, 8 bits": "8 bits",
    "peakgpt, 4 bits by 64": "4 bits by 64",
    "peakgpt, 4 bits by 32": "4 bits by 32",
    "torch": "torch, bfloat16",
    "torch, 8 bits": "torch, 8 bits (weights only, no bias)",
}
PRODUCTS = {
    rows: Group(bench="products", dtype="bfloat16", case={"rows": rows}, contenders=tuple(GEMM)) for rows in (1, 8, 512)
}
LLAMA_1B, QWEN_06B = {"n_layer": 16, "n_embd": 2048}, {"n_layer": 28, "n_embd": 1024}
FAMILY_DECODE = [  # text, weight format, sizes, streams, our contender
    ("Llama-3.2-1B", "bfloat16", LLAMA_1B, 1, OURS),
    ("Llama-3.2-1B", "int8", LLAMA_1B, 1, OURS),
    ("Llama-3.2-1B", "bfloat16", LLAMA_1B, 8, OURS),
    ("Llama-3.2-1B", "int8", LLAMA_1B, 8, OURS),
    ("Qwen3-0.6B", "bfloat16", QWEN_06B, 1, OURS),
    ("Qwen3-0.6B", "int4", QWEN_06B, 1, "peakgpt by 32"),
]
FAMILY_PREFILL = {
    dtype: Group(bench="prefill", dtype=dtype, case={"tokens": 512, **LLAMA_1B}, contenders=(OURS, "llama.cpp"))
    for dtype in ("bfloat16", "int8")
}
FAMILY_TRAINING = Group(
    bench="train", dtype="bfloat16", case={"batch": 2, "tokens": 512, "n_layer": 4, "n_embd": 2048},
    contenders=(OURS, "eager, tuned malloc", "compile, tuned malloc"),
)  # fmt: skip
TRL = ("TRL", "TRL, tuned malloc")
FINETUNING = Group(bench="finetune", dtype="bfloat16", contenders=(OURS, *TRL),
                   case={"tokens": ANY, "examples": 4, "longest": 512, **GPT2})  # fmt: skip
CACHE = {
    streams: Group(bench="step", dtype="bfloat16", case={"model": "gpt2", "streams": streams, "past": 900},
                   contenders=(OURS, "peakgpt, int8 cache"))
    for streams in (8, 1)
}  # fmt: skip
STREAMS = {**GPT2, "prompt": 32, "batch": 64}
SERVE = Group(bench="serve", dtype="bfloat16", case={**STREAMS, "tokens": 128}, contenders=(OURS, "engine"))
SERVE_ALONE = [
    Group(bench="serve", dtype="bfloat16", case=case, contenders=(OURS,))
    for case in ({**STREAMS, "tokens": 128, "time": "without a pause"}, {**STREAMS, "time": "first token"},
                 {**STREAMS, "time": "between tokens"})
]  # fmt: skip
RECOMPUTE = Group(bench="train", dtype="bfloat16", contenders=tuple(TRAINING),
                  case={"batch": 4, "tokens": 256, **GPT2, "recompute": "norm"})  # fmt: skip


# ---- tables


def _training_row(contender: str, label: str) -> tuple[Cell, ...]:
    figures = [
        (tokens_per_s(group, contender), share_of_peak(group, contender),
         "" if contender == OURS else against(group, contender))
        for group in TRAIN.values()
    ]  # fmt: skip
    return label, *(cell for three in figures for cell in three)


def _decode_row(dtype: str, streams: int) -> tuple[Cell, ...]:
    group, ours = DECODE[dtype, streams], "peakgpt by 32" if dtype == "int4" else OURS
    engines = ENGINES[dtype]
    return (f"{FORMATS[dtype]}, {streams}", tokens_per_s(group, ours), fastest(group, engines, ours),
            against_fastest(group, engines, ours))  # fmt: skip


def _by_64_row(streams: int) -> tuple[Cell, ...]:
    return f"4 bits by 64, {streams}", tokens_per_s(DECODE["int4", streams]), "no engine has this format", ""


ALL_ENGINES = ("llama.cpp", "openvino", "onnxruntime", "transformers", "eager")


def _engines_row(dtype: str, streams: int, ours: str, label: str) -> tuple[Cell, ...]:
    group = DECODE[dtype, streams]
    engines = () if label == "4 bits by 64" else ENGINES[dtype]
    others = [tokens_per_s(group, name) if name in engines else "" for name in ALL_ENGINES]
    return label, str(streams), tokens_per_s(group, ours), *others


def _op_row(op: str) -> tuple[Cell, ...]:
    groups = [
        Group(bench="op", dtype=dtype, case={"op": op, "pass": direction}, contenders=(OURS, "eager"))
        for dtype in ("float32", "bfloat16") for direction in ("forward", "forward+backward")
    ]  # fmt: skip
    return op, *(against(group, "eager") for group in groups)


def _prefill_rows() -> list[tuple[Cell, ...]]:
    return [
        (FORMATS[dtype], milliseconds(group), name, milliseconds(group, name), against(group, name))
        for dtype, group in PREFILL.items() for name in PREFILL_ENGINES[dtype]
    ]  # fmt: skip


def _family_rows() -> list[tuple[Cell, ...]]:
    decoding = [
        (f"{model}, {FORMATS[dtype]}, {streams} {'stream' if streams == 1 else 'streams'}",
         Group(bench="decode", dtype=dtype, case={**sizes, "prompt": ANY, "tokens": ANY, "batch": streams},
               contenders=(ours, "llama.cpp")), "llama.cpp", ours)
        for model, dtype, sizes, streams, ours in FAMILY_DECODE
    ]  # fmt: skip
    prompt = [
        (f"Llama-3.2-1B, {FORMATS[dtype]}, a prompt of 512 tokens", group, "llama.cpp", OURS)
        for dtype, group in FAMILY_PREFILL.items()
    ]
    training = [
        ("Llama-3.2-1B with 4 layers and a vocabulary of 32,000, training in bfloat16", FAMILY_TRAINING, name, OURS)
        for name in FAMILY_TRAINING.contenders[1:]
    ]
    return [
        (text, milliseconds(group, ours), TRAINING.get(name, name), milliseconds(group, name),
         against(group, name, ours))
        for text, group, name, ours in (*decoding, *prompt, *training)
    ]  # fmt: skip


TABLES = (
    Table(
        name="training", document="README.md",
        headings=("", "bf16 tokens/s", "MFU", "peakgpt is faster", "fp32 tokens/s", "MFU", "peakgpt is faster"),
        rows=[_training_row(*item) for item in TRAINING.items()],
    ),
    Table(
        name="inference", document="README.md",
        headings=("weights, streams", "peakgpt", "fastest other engine", "times as fast"),
        rows=[row for streams in (1, 8)
              for row in (*(_decode_row(dtype, streams) for dtype in ENGINES), _by_64_row(streams))],
    ),
    Table(
        name="prompts and patched models", document="README.md",
        headings=("work", "peakgpt, ms", "versus", "ms", "times as fast"),
        rows=[
            *((f"a prompt of 512 tokens, {FORMATS[dtype]}", milliseconds(group), "openvino",
               milliseconds(group, "openvino"), against(group, "openvino")) for dtype, group in PREFILL.items()),
            *((f"patched {PATCH[0][0]}", milliseconds(PATCH[0][1]), name, milliseconds(PATCH[0][1], name),
               against(PATCH[0][1], name)) for name in PATCHED[1:]),
        ],
    ),
    Table(
        name="training on a CPU", document="docs/cpu.md",
        headings=("versus", "bfloat16, times as fast", "memory", "float32, times as fast", "memory",
                  "bfloat16, `--recompute norm`, times as fast", "memory"),
        rows=[(label, *(cell for group in (*TRAIN.values(), RECOMPUTE)
                        for cell in (against(group, name), memory_ratio(group, name))))
              for name, label in TRAINING.items() if name != OURS],
    ),
    Table(
        name="decoding", document="docs/inference.md",
        headings=("weights", "streams", "peakgpt", *ALL_ENGINES),
        rows=[_engines_row(dtype, streams, ours, label) for streams in (1, 8) for dtype, ours, label in (
            ("bfloat16", OURS, "bfloat16"), ("int8", OURS, "8 bits"), ("int4", "peakgpt by 32", "4 bits by 32"),
            ("int4", OURS, "4 bits by 64"))],
    ),
    Table(
        name="prefill", document="docs/inference.md",
        headings=("weights", "peakgpt, ms", "versus", "ms", "times as fast"), rows=_prefill_rows(),
    ),
    Table(
        name="int8 cache", document="docs/inference.md",
        headings=("streams", "bfloat16 cache, ms", "int8 cache, ms", "times as fast"),
        rows=[(str(streams), milliseconds(group), milliseconds(group, "peakgpt, int8 cache"),
               against(group, OURS, "peakgpt, int8 cache")) for streams, group in CACHE.items()],
    ),
    Table(
        name="patched models", document="docs/dropin.md",
        headings=("work", "times as fast", "versus tuned", "peak memory, ratio"),
        rows=[(label, against(group, PATCHED[1]), against(group, PATCHED[2]), memory_ratio(group, PATCHED[1]))
              for label, group in PATCH],
    ),
    Table(
        name="linear layers", document="docs/quantized.md",
        headings=("ms", "1 row", "8 rows", "512 rows, without the head"),
        rows=[(label, *(milliseconds(group, name) for group in PRODUCTS.values())) for name, label in GEMM.items()],
    ),
    Table(
        name="ops of other families", document="docs/families.md",
        headings=("op", "float32 forward", "forward and backward", "bfloat16 forward", "forward and backward"),
        rows=[_op_row(op) for op in ("rmsnorm", "add_rmsnorm", "gated_mlp")],
    ),
    Table(
        name="models of other families", document="docs/families.md",
        headings=("sizes and work", "peakgpt, ms", "versus", "ms", "times as fast"), rows=_family_rows(),
    ),
    Table(
        name="fine-tuning", document="docs/finetuning.md",
        headings=("GPT-2 124M, bfloat16", "ms", "peakgpt is faster", "its memory, ratio"),
        rows=[("peakgpt, packed", milliseconds(FINETUNING), "", ""),
              *((name, milliseconds(FINETUNING, name), against(FINETUNING, name), memory_ratio(FINETUNING, name))
                for name in TRL)],
    ),
    Table(
        name="serving without pauses", document="docs/serving.md", headings=("median, ms", "all"),
        rows=[(milliseconds(group) if "tokens" not in group.case else "", note(group)) for group in SERVE_ALONE],
    ),
    Table(
        name="serving", document="docs/serving.md",
        headings=("server, tokens/s", "engine alone, tokens/s", "server, times as fast"),
        rows=[(tokens_per_s(SERVE), tokens_per_s(SERVE, "engine"), against(SERVE, "engine"))],
    ),
)  # fmt: skip
