"""Every path of inference for every family of docs/families.md that came after BLOOM: beams, scores, weights of 8 and
4 bits, and for some of them the server and the commands. One table; what is compared is transformers.
"""

import json

import pytest
import torch
from packed_checkpoints import write_checkpoint
from serving import Running, with_chat
from tiny_transformers import MODELS, build

from peakgpt.cli import main
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer

FIRST = list(MODELS).index("llama")
FAMILIES = list(MODELS)[FIRST:]
TEXT = "the canary sings a song, é and more"
VOCAB = 300
PROMPT, END = 5, 12


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 270)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tokenizer):
    """Return a function: name of a family -> (model of transformers, folder of it with a tokenizer)."""
    made = {}

    def folder(name):
        if name not in made:
            no_ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
            model = build(name, vocab_size=VOCAB, **no_ends).eval()
            path = tmp_path_factory.mktemp("family")
            model.save_pretrained(path)
            tokenizer.save(path)
            made[name] = model, path
        return made[name]

    return folder


def prompts(rows=2, tokens=PROMPT):
    return torch.randint(5, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_and_scores_equal_transformers(name, folder_of):
    theirs, folder = folder_of(name)
    model, ids = GPT.from_pretrained(folder, dropout=0.0), prompts()
    options = {"num_beams": 3, "max_length": END, "min_length": END, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model.generate(ids, max_new_tokens=END - PROMPT, num_beams=3), expected)
    text = prompts(1, END)[0].tolist()
    with torch.no_grad():
        log_p = theirs(torch.tensor([text[:-1]])).logits.log_softmax(-1)[0].gather(1, torch.tensor(text[1:])[:, None])
    (score,) = Scorer(model).score([(text[:3], text[3:])])
    torch.testing.assert_close(torch.tensor(score.logprobs), log_p[2:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_weights_are_near_the_floats_on_every_path(name, bits, folder_of, tmp_path, capsys):
    """The logits, the text of `generate`, of beams and of the engine, and scores; the C++ program runs the model."""
    theirs, folder = folder_of(name)
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--bits", str(bits)]) == 0
    model, ids = GPT.from_pretrained(tmp_path / "out", dropout=0.0), prompts(1, END)
    with torch.no_grad():
        logits, expected = model(ids), theirs(ids).logits
        assert (logits - expected).norm() < {8: 0.1, 4: 0.5}[bits] * expected.norm()
        text = model.generate(ids[:, :PROMPT], max_new_tokens=END - PROMPT)[0].tolist()
    engine = Engine(model, blocks=4)
    engine.submit(text[:PROMPT], SamplingParams(temperature=0, max_tokens=END - PROMPT))
    assert [token for output in engine.outputs() for token in output.token_ids] == text[PROMPT:]
    assert not engine.executor_note
    assert model.generate(ids, max_new_tokens=3, num_beams=2).shape == (1, END + 3)
    (score,) = Scorer(model).score([(ids[0, :1].tolist(), ids[0, 1:].tolist())])
    log_p = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(score.logprobs), log_p, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["llama", "mixtral, experts", "gpt_oss, experts"])
def test_the_server_answers_completions_and_chats(name, folder_of, tokenizer):
    model = GPT.from_pretrained(folder_of(name)[1], dropout=0.0)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with Running(model, with_chat(tokenizer, template)) as server:
        fields = {"max_tokens": 6, "temperature": 0}
        status, completion = server.ask("/v1/completions", {"prompt": TEXT, **fields})
        assert status == 200, completion
        status, chat = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}], **fields})
        assert status == 200, chat
    params = SamplingParams(temperature=0, max_tokens=6)
    expected = "".join(output.text for output in Engine(model, tokenizer).stream(tokenizer.encode(TEXT), params))
    assert completion["choices"][0]["text"] == chat["choices"][0]["message"]["content"] == expected
    assert completion["usage"]["completion_tokens"] == chat["usage"]["completion_tokens"] == 6


def mxfp4_checkpoint(folder):
    """Write a gpt-oss with random MXFP4 experts."""
    from safetensors.torch import load_file, save_file

    name, path = "gpt_oss, experts", folder / "model.safetensors"
    build(name, vocab_size=VOCAB, hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(folder)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, rows, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, (experts, rows, inputs // 32), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "mxfp4"}}))


INTEGERS = {
    "gpt-oss, MXFP4": mxfp4_checkpoint,
    "llama, GPTQ": write_checkpoint,
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_commands_take_checkpoints_of_integers(kind, tmp_path, tokenizer, capsys):
    """generate and score multiply by the integers; train decodes them."""
    folder, corpus, run = tmp_path / "model", tmp_path / "corpus.txt", tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    INTEGERS[kind](folder)
    tokenizer.save(folder)
    corpus.write_text((TEXT + "\n") * 200)
    assert main(["generate", str(folder), "--prompt", TEXT, "-n", "5", "--temperature", "0"]) == 0
    assert main(["score", str(folder), "--context", "the", "--continuation", " canary"]) == 0
    assert main(["score", str(folder), "--text", str(corpus)]) == 0
    flags = ["--steps", "2", "--batch", "2", "--tokens", "16", "--device", "cpu"]
    assert main(["train", "--init", str(folder), "--text", str(corpus), "--out", str(run), *flags]) == 0
    assert GPT.from_pretrained(run).config.vocab_size == GPT.from_pretrained(folder).config.vocab_size


@pytest.mark.parametrize("kind", INTEGERS)
def test_training_a_model_of_integers_is_one_sentence(kind, tmp_path):
    """Trainer and backward say what to do. Seen to fail: torch's "does not require grad"."""
    INTEGERS[kind](tmp_path)
    model, ids = GPT.from_pretrained(tmp_path), prompts()
    message = r"got quantized weights, such as transformer\.h\.0\.\S+, which have no gradients, .*dequantize=True"
    with pytest.raises(ValueError, match=f"Trainer: {message}"):
        Trainer(model, TrainConfig(batch=2, tokens=PROMPT, dtype=torch.float32), steps=1)
    for mode in (True, False):
        with pytest.raises(ValueError, match=f"backward: {message}") as error:
            model.train(mode)(ids, ids).backward()
        assert "\n" not in str(error.value)
    with torch.no_grad():
        assert not model(ids, ids).requires_grad
    floats = GPT.from_pretrained(tmp_path, dequantize=True).train()
    floats(ids, ids).backward()
    assert all(p.grad is not None for p in floats.parameters())
