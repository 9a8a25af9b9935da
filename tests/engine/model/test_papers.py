"""The families that transformers lacks equal helpers/papers.py: logits, loss, gradients, greedy output; and files."""

import dataclasses

import papers
import pytest
import torch
import torch.nn.functional as F
from left_padding import check_left_padding
from transformers.models.t5.modeling_t5 import T5Attention

import peakgpt
from peakgpt.engine.model import flops
from peakgpt.engine.model.presets import preset
from peakgpt.engine.model.relative_positions import distances
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.ops.attention import attention

V, T = 41, 24
TINY = {"n_layer": 2, "n_embd": 24, "n_head": 3, "head_dim": 16, "block_size": T, "vocab_size": V}
VARIANTS = {
    "gpt3": (papers.gpt3, preset("gpt3-small", **TINY, windows=(None, 5))),
    "palm": (papers.palm, preset("palm-8b", **TINY, logit_scale=24**-0.5)),
    "gopher": (papers.gopher, preset("gopher-44m", **TINY)),
    "glam": (papers.glam, preset("glam-64b-64e", **{**TINY, "n_layer": 4}, n_inner=40, experts=5)),
}
BACKENDS = ("eager", "cpu")


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """Build the paper's function and our model. Large weights make attention far from uniform."""
    paper, config = VARIANTS[request.param]
    torch.manual_seed(5)
    model = peakgpt.GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.dim() > 1 else 0.05) * torch.randn_like(parameter))
    return paper, model


def batch(rows=2, tokens=17):
    torch.manual_seed(3)
    ids = torch.randint(V, (rows, tokens + 1))
    targets = ids[:, 1:].clone()
    targets[0, -3:] = -100
    return ids[:, :-1].contiguous(), targets


def double(model):
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", (*BACKENDS, "gpu"))
def test_logits_loss_and_gradients_equal_the_papers(pair, backend):
    paper, model = pair
    with use_backend(backend):
        if reason := attention.explain(*attention.sample(1, 4, 1, 16))[backend]:
            pytest.skip(reason)
    ids, targets = batch(1, 9) if backend == "gpu" else batch()  # small: the interpreter is slow
    weights = double(model)
    results = [paper(model.config, row, weights) for row in ids]
    logits = torch.stack([row for row, _ in results])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    model.zero_grad()
    with use_backend(backend):
        torch.testing.assert_close(model(ids).double(), logits, rtol=1e-5, atol=1e-5)
        ours = model(ids, targets)
        ours.backward()
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-5)
    for row, (_, added) in zip(ids, results, strict=True):
        got = model.train()(row[None], row[None]) - model.eval()(row[None], row[None])
        assert got.item() == pytest.approx(float(torch.as_tensor(added).detach()), rel=1e-3, abs=1e-6)
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        expected = torch.zeros_like(weights[name]) if expected is None else expected  # an expert without tokens
        torch.testing.assert_close(
            parameter.grad.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_cached_greedy_output_equals_the_papers(pair):
    paper, model = pair
    prompt = batch(2)[0][:, :7]
    weights = {name: p.detach() for name, p in double(model).items()}
    expected = []
    for row in prompt:
        for _ in range(8):
            row = torch.cat((row, paper(model.config, row, weights)[0][-1:].argmax(-1)))
        expected.append(row)
    for backend in BACKENDS:
        with use_backend(backend):
            assert torch.equal(model.generate(prompt, max_new_tokens=8), torch.stack(expected))
    assert len({*torch.stack(expected)[:, 7:].flatten().tolist()}) > 3, "an output that repeats one token proves little"


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_changes_nothing(pair, backend):
    with use_backend(backend):
        check_left_padding(pair[1], *batch())


def test_save_and_load_gives_the_same_model(pair, tmp_path):
    _, model = pair
    with pytest.warns(UserWarning, match="no layout of transformers can express this model"):
        model.save_pretrained(tmp_path)
    again = peakgpt.GPT.from_pretrained(tmp_path)
    assert again.config == model.config and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_parameter_count_equals_the_models(pair):
    _, model = pair
    assert flops.parameter_count(model.config) == sum(p.numel() for p in model.parameters())


def test_distance_buckets_equal_t5s():
    distance = torch.arange(399, -1, -1)
    expected = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    assert torch.equal(distances(VARIANTS["glam"][1], 400, "cpu"), expected)
    assert expected.tolist() == [papers.bucket(d) for d in distance.tolist()]


@pytest.mark.parametrize("name", ("palm", "gopher"))
def test_compiles_as_one_graph(name):
    torch.manual_seed(5)
    model, (ids, targets) = peakgpt.GPT(dataclasses.replace(VARIANTS[name][1], n_layer=1, windows=(None,))), batch()
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, targets)
    loss.backward()
    torch.testing.assert_close(loss, model(ids, targets))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_loss_is_near_float32_and_gradients_are_finite(pair):
    _, model = pair
    ids, targets = batch()
    expected = model(ids, targets)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, targets)
    loss.backward()
    assert (loss - expected).abs() < 0.05 * expected
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_loss_falls_in_bfloat16(pair):
    _, model = pair
    torch.manual_seed(5)
    model = peakgpt.GPT(model.config)
    ids, targets = batch()
    optimizer = model.configure_optimizer(lr=1e-2, dtype=torch.bfloat16)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(model(ids, targets))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("changes", [{}, {"tied_head": False, "head_bias": True}], ids=("fused", "of logits"))
def test_z_loss_of_micro_batches_adds_up_and_skips_ignored_targets(changes):
    torch.manual_seed(5)
    model = peakgpt.GPT(preset("gpt2-tiny", **{**TINY, "n_layer": 1, **changes}, z_loss=0.5)).train()
    ids, targets = batch()
    whole, plain = model(ids, targets), model.eval()(ids, targets)
    live = targets != -100
    torch.testing.assert_close(whole - plain, 0.5 * model(ids)[live].logsumexp(-1).square().mean(), rtol=1e-4, atol=0)
    weight = (1.0 / live.sum()).expand(targets.shape)
    parts = [model.train()(ids[i : i + 1], targets[i : i + 1], loss_weight=weight[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(parts), whole)
