"""FASTA: records, annotations and control tags; the worked example on invented proteins."""

import gzip
import importlib.util
import random
from pathlib import Path

import pytest

from peakgpt.cli import main
from peakgpt.engine.data import documents
from peakgpt.engine.data.documents import ReadOptions, read_documents
from peakgpt.engine.data.fasta import annotations, control_tags
from peakgpt.engine.data.sources import open_sources

EXAMPLES = Path(__file__).parents[3] / "examples" / "protein"
FILE = """>sp|P1|ZN1 Zinc finger protein 1 OS=Homo sapiens OX=9606 GN=ZN1 PE=1 SV=2
MKCPEC
GKSF*

>seq2 [family=zinc finger] [organism=Mus musculus] x
acd-ef
>bare
MM
"""


def read(path, **options):
    return [(d.name, d.text) for d in read_documents(path, path.name, ReadOptions(**options))]


@pytest.mark.parametrize(("header", "found"), [
    ("sp|P1|ZN1 Zinc finger OS=Homo sapiens (strain K12) OX=9606 GN=Z PE=1", {"OS": "Homo sapiens (strain K12)",
     "OX": "9606", "GN": "Z", "PE": "1"}),
    ("seq [family=zinc finger] [organism=Mus] [family=b]", {"family": "zinc finger", "organism": "Mus"}),
    ("x family=a [organism=b c] kind=d", {"family": "a", "organism": "b c", "kind": "d"}),
    ("no annotations here", {}), ("", {}),
])  # fmt: skip
def test_annotations_of_uniprot_and_ncbi(header, found):
    assert annotations(header) == found


def test_tags_are_in_the_order_of_the_keys():
    assert control_tags("s [a=1] [b=] [c=x y]", ("c", "none", "b", "a")) == "<c=x y><a=1>"


@pytest.mark.parametrize("suffix", [".fasta", ".fa.gz"])
def test_a_record_is_a_document(tmp_path, suffix, monkeypatch):
    """Its lines are joined; blank lines and line ends of Windows do not matter."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 7)
    path, data = tmp_path / f"p{suffix}", FILE.replace("\n", "\r\n").encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    names = [f"{path.name}:{line}" for line in (1, 5, 7)]
    assert read(path) == list(zip(names, ("MKCPECGKSF*", "acd-ef", "MM"), strict=True))
    tagged = ("<OS=Homo sapiens>MKCPECGKSF*", "<family=zinc finger>acd-ef", "MM")
    assert [text for _, text in read(path, tags=("OS", "family"))] == list(tagged)
    [source] = open_sources([tmp_path], ReadOptions())  # found in a folder
    assert len(list(source)) == 3


@pytest.mark.parametrize(("text", "options", "message"), [
    ("MK\n>a\nMK", {}, "p.fasta:1: got 'MK', expected a header line, which begins with '>'"),
    (">a\nMK\n>b\n>c\nM", {}, "p.fasta:3: got a header without residues"),
    (">a\nMK\n\n>b\n", {}, "p.fasta:4: got a header without residues"),
    (">a\nMK 12\n", {}, "p.fasta:2: got 'MK 12', expected residues"),
    ("\n", {}, "p.fasta: got no header line"),
    (">a [x=1]\nMK", {"tags": ("y",)}, "p.fasta: got no header with 'y' of --tags, expected one of its annotations: x"),
])  # fmt: skip
def test_faults_are_named_with_their_line(text, options, message, tmp_path):
    (tmp_path / "p.fasta").write_text(text)
    with pytest.raises(ValueError) as error:
        read(tmp_path / "p.fasta", **options)
    assert message in str(error.value)


def test_tags_need_fasta(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    assert main(["prepare", str(tmp_path / "a.txt"), "--tags", "x", "--out", str(tmp_path / "out")]) == 2
    assert "a.txt: got it with --tags x, expected FASTA files" in capsys.readouterr().err


# ---- the example


@pytest.fixture(scope="module")
def grammar():
    return load("grammar")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_grammar_writes_sequences_of_its_families(grammar, tmp_path):
    """Nearly all: a motif of another family occurs by chance."""
    path, other = tmp_path / "a.fasta", tmp_path / "b.fasta"
    grammar.write_fasta(path, 300, seed=1)
    grammar.write_fasta(other, 300, seed=1)
    assert path.read_bytes() == other.read_bytes()
    rows = [text.removeprefix("<family=").split(">") for _, text in read(path, tags=("family",))]
    assert len(rows) == 300 and {family for family, _ in rows} == set(grammar.MOTIFS)
    assert sum(grammar.family_of(sequence) == family for family, sequence in rows) >= 297


@pytest.mark.slow
def test_a_trained_model_follows_its_tags(grammar, tmp_path, monkeypatch):
    """Right tags give a lower per-residue perplexity than those of other families; sampled sequences have the motif."""
    from peakgpt import GPT, Engine, SamplingParams, Tokenizer

    monkeypatch.chdir(tmp_path)
    grammar.write_fasta(Path("proteins.fasta"), 2000, seed=0)
    grammar.write_fasta(Path("held_out.fasta"), 60, seed=1)
    words = "--n-layer 2 --n-head 4 --n-embd 64 --tokens 128 --batch 16 --lr 3e-3 --steps 800 --device cpu --vocab 257"
    tags = ["--tags", "family", "organism"]
    assert main(["train", "--text", "proteins.fasta", *tags, *words.split(), "--out", "run"]) == 0
    module = load("residue_perplexity")
    right = module.measure(module.open_checkpoint("run"), Path("held_out.fasta"), ("family", "organism"), "family")
    families = list(grammar.MOTIFS)
    text = Path("held_out.fasta").read_text()
    for family, following in zip(families, families[1:] + families[:1], strict=True):
        text = text.replace(f"[family={family}]", f"[family={following}\0]")
    Path("swapped.fasta").write_text(text.replace("\0", ""))
    swapped = module.measure(module.open_checkpoint("run"), Path("swapped.fasta"), ("family", "organism"))
    assert set(right) == {"all", *families} and right["all"][1] == 60
    assert right["all"][0] < 0.97 * swapped["all"][0]
    source = sorted(Path("run", "checkpoints").glob("step-*"))[-1]
    model, tokenizer = GPT.from_pretrained(source), Tokenizer.load(source)
    engine, counts = Engine(model, tokenizer), {}
    for family in families:
        prompt = tokenizer.encode(f"<family={family}><organism=mesophile>")
        engine.submit(prompt, SamplingParams(max_tokens=110, n=20, seed=random.Random(family).getrandbits(60)))
        texts = [""] * 20
        for output in engine.outputs():
            texts[output.index] += output.text
        counts[family] = {other: sum(grammar.family_of(text) == other for text in texts) for other in families}
    assert all(max(row, key=row.get) == family and row[family] >= 5 for family, row in counts.items()), counts
