"""Headers of .gguf files that no writer makes: each is one sentence, without a crash and without memory."""

import random
import resource
import struct

import pytest
from gguf_files import build, export

from peakgpt.engine.data import gguf_header
from peakgpt.engine.data.gguf_header import read_header
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT

pytest.importorskip("gguf", reason="needs the package gguf")
HUGE = (1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
MAX_GROWTH = 256 << 20  # bytes that reading a damaged file of 100 KB may take


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name, shape=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def made(*pairs, tensors=(), data=b"", version=3, counts=None):
    """Return the bytes of a file, with other counts of tensors and pairs than it has."""
    counts = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


NAME = pair("general.architecture", 8, text("gpt2"))
ROW = b"\0" * 128
CASES = {
    "empty": (b"", "got 0 bytes, expected a GGUF file"),
    "another format": (b"PK\3\4" + b"\0" * 40, "begins with b'PK"),
    "version 1": (made(version=1), "got GGUF version 1, expected 2 or 3"),
    "a newer version": (made(version=4), "got GGUF version 4, expected 2 or 3"),
    "big-endian": (made(version=3 << 24), "the file is big-endian"),
    "count of pairs": (made(NAME, counts=(0, 1 << 60)), "got a count of 1152921504606846976 metadata entries"),
    "count of tensors": (made(NAME, counts=(1 << 63, 1)), "got a count of 9223372036854775808 tensors"),
    "length of a key": (made(struct.pack("<Q", 1 << 62) + b"abc", counts=(0, 1)), "got a length of 46116860184273"),
    "length of a string": (made(pair("a", 8, struct.pack("<Q", 5000))), "bytes for a at byte"),
    "length of an array": (made(pair("a", 9, struct.pack("<IQ", 4, 1 << 40))), "got 1099511627776 items in a"),
    "array past the end": (made(pair("a", 9, struct.pack("<IQ", 4, 1 << 20))), "the file is truncated or damaged"),
    "strings past the end": (made(pair("a", 9, struct.pack("<IQ", 8, 1 << 20))), "got a count of 1048576 strings in a"),
    "array of arrays": (made(pair("a", 9, struct.pack("<IQ", 9, 1))), "got an array of type 9 for a"),
    "unknown type": (made(pair("a", 13, b"")), "got type 13 for a"),
    "bool of 2": (made(pair("a", 7, b"\2")), "got a bool other than 0 and 1 in a"),
    "key twice": (made(NAME, NAME), "got the metadata key 'general.architecture' twice"),
    "not UTF-8": (made(struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 1)), "expected UTF-8"),
    "alignment 0": (made(pair("general.alignment", 4, struct.pack("<I", 0))), "general.alignment is '0'"),
    "alignment 48": (made(pair("general.alignment", 4, struct.pack("<I", 48))), "expected a power of two"),
    "no dimensions": (made(tensors=[tensor("a", ())], data=ROW), "with 0 dimensions, expected 1 to 4"),
    "many dimensions": (made(tensors=[text("a") + struct.pack("<I", 1 << 31), ROW]), "2147483648 dimensions"),
    "zero size": (made(tensors=[tensor("a", (0,))], data=ROW), r"of shape \(0,\), expected rows"),
    "huge sizes": (made(tensors=[tensor("a", HUGE[-1:] * 4)], data=ROW), "got tensor 'a' at bytes 0 to"),
    "no whole blocks": (made(tensors=[tensor("a", (33,), 8)], data=ROW), "of 32 elements, as its type is Q8_0"),
    "unsupported type": (made(tensors=[tensor("a", (256,), 16)], data=ROW), "of type IQ2_XXS, expected one of F32"),
    "unknown ggml type": (made(tensors=[tensor("a", (32,), 99)], data=ROW), "of type number 99"),
    "past the end": (made(tensors=[tensor("a", (33,))], data=ROW), "and an end up to 128"),
    "offset past the end": (made(tensors=[tensor("a", offset=1 << 40)], data=ROW), "the file is truncated or damaged"),
    "offset that wraps": (made(tensors=[tensor("a", offset=(1 << 64) - 32)], data=ROW), "truncated or damaged"),
    "odd offset": (made(tensors=[tensor("a", (8,), offset=4)], data=ROW), "expected a multiple of 32"),
    "overlap": (made(tensors=[tensor("a"), tensor("b")], data=ROW), "got tensors 'a' and 'b' that overlap"),
    "tensor twice": (made(tensors=[tensor("a"), tensor("a", offset=128)], data=ROW * 2), "got tensor 'a' twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_header_is_one_sentence(name, tmp_path):
    content, message = CASES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, reason in ((tmp_path / "none.gguf", "(?i)no such f"), (tmp_path / "folder.gguf", "a folder")):
        if reason == "a folder":
            path.mkdir()
        for read in (read_header, GPT.from_pretrained, Tokenizer.load):
            with pytest.raises(ValueError, match=reason):
                read(path)


def test_values_of_every_type_are_read(tmp_path):
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    pairs = [pair(f"k{kind}", kind, struct.pack(f"<{code}", 7)) for kind, code in scalars.items()]
    pairs += [pair("yes", 7, b"\1"), pair("eps", 6, struct.pack("<f", 1e-5)), pair("text", 8, text("é")),
              pair("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
              pair("numbers", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3))]  # fmt: skip
    path = tmp_path / "m.gguf"
    path.write_bytes(made(*pairs, tensors=[tensor("a", (2, 32), 8)], data=b"\0" * 68))
    header = read_header(path)
    assert [header.metadata[f"k{kind}"] for kind in scalars] == [7] * len(scalars)
    assert (header.metadata["yes"], header.metadata["eps"], header.metadata["text"]) == (True, 1e-5, "é")
    assert header.metadata["words"] == ["a", ""] and header.metadata["numbers"].tolist() == [1, -2, 3]
    assert header.tensors["a"].shape == (2, 32) and header.tensors["a"].end == path.stat().st_size


def mutated(rng, content, header_bytes):
    """Return the content with one to three damages, most of them in the header."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(header_bytes) if rng.random() < 0.95 else rng.randrange(len(content))
        kind = rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))
        elif kind == 2:
            content[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 13, 255, (1 << 32) - 1, rng.getrandbits(32))))
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            del content[at : at + rng.randint(1, 16)]
        else:
            content[at:at] = rng.randbytes(rng.randint(1, 16))
        if len(content) < 8:
            break
        header_bytes = min(header_bytes, len(content))
    return bytes(content)


def fuzz(tmp_path, count, seed):
    """Read damaged files; return how many were refused."""
    model = build("gpt2")
    export(model, tmp_path / "whole.gguf", "q8_0")
    content = (tmp_path / "whole.gguf").read_bytes()
    header_bytes = min(entry.start for entry in read_header(tmp_path / "whole.gguf").tensors.values())
    rng, path, refused = random.Random(seed), tmp_path / "damaged.gguf", 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        path.write_bytes(mutated(rng, content, header_bytes))
        for read in (GPT.from_pretrained, Tokenizer.load):
            try:
                read(path)
            except ValueError as error:  # any other exception fails the test
                assert "damaged.gguf" in str(error) and "\n" not in str(error), error
                refused += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MAX_GROWTH, f"{grown >> 20} MiB"
    return refused


def test_100_damaged_files_are_read_or_refused(tmp_path):
    assert fuzz(tmp_path, 100, seed=1) > 100


@pytest.mark.slow
def test_2000_damaged_files_are_read_or_refused(tmp_path):
    assert fuzz(tmp_path, 2000, seed=0) > 2000


def test_the_types_are_those_of_gguf():
    import gguf

    for number, kind in gguf_header.TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.elements, kind.size)
    for number, name in gguf_header.OTHER_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
