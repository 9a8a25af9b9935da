"""Muon: torch's steps, the matrices that it updates, and a training with it that resumes to the bit."""

import copy
import math

import pytest
import torch
from torch import nn

from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import matrix_count
from peakgpt.engine.training.muon import OPTIONS, Muon, block_matrices
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.ops.adamw import join
from peakgpt.kernels.ops.muon import NS_COEFFICIENTS, NS_STEPS

BACKENDS = ("eager", "cpu", "gpu")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((24, 40), (40, 24), (16, 16), (24, 40), (1, 8))
SIZES = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 37}
VARIANTS = {
    "gpt2": {},
    "gated": {"gated_mlp": True, "bias": False},
    "experts": {"experts": 3, "experts_per_token": 2, "experts_every": 1, "gated_experts": True, "bias": False},
    "wide heads": {"head_dim": 16, "n_inner": 24, "tied_head": False},
    "transformer_xl": {"position": "transformer_xl", "n_kv_head": 4},
    "relative_bias": {"position": "relative_bias", "bias": False},
}


def group_of(params, **changes):
    options = dict(zip(OPTIONS, (0.9, True, NS_COEFFICIENTS, NS_STEPS, "match_rms_adamw"), strict=True))
    return {"params": params, "use_muon": True, "split_rows": None, "weight_decay": 0.1, **options, **changes}


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_steps_equal_torch_with_float32_products(backend, adjust_lr_fn, nesterov, monkeypatch):
    """torch casts to bfloat16 for its products. Mutation that makes it fail: coefficients in another order."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = parameters(), parameters()
    a = Muon([group_of(ours, adjust_lr_fn=adjust_lr_fn, nesterov=nesterov)], lr=0.02)
    b = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn
    )
    with use_backend(backend):
        for step in range(4):
            for params, optimizer in ((ours, a), (theirs, b)):
                set_gradients(params, step)
                optimizer.step()
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)
                torch.testing.assert_close(a.state[x]["momentum_buffer"], b.state[y]["momentum_buffer"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_fused_weight_and_experts_of_a_stack_are_matrices_of_their_own(backend):
    """Mutation that makes it fail: split_rows that is ignored."""
    (whole,), parts = parameters([(3, 20, 16)]), parameters([(8, 16), (8, 16), (4, 16)] * 3)
    rows = (8, 8, 4)
    with torch.no_grad():
        for part, value in zip(parts, (p for matrix in whole for p in matrix.split(rows)), strict=True):
            part.copy_(value)
    a, b = Muon([group_of([whole], split_rows=rows)], lr=0.02), Muon([group_of(parts)], lr=0.02)
    with use_backend(backend):
        for step in range(2):
            set_gradients([whole], step)
            for part, grad in zip(parts, (g for matrix in whole.grad for g in matrix.split(rows)), strict=True):
                part.grad = grad.clone()
            a.step()
            b.step()
    torch.testing.assert_close(whole, torch.cat(list(parts)).view(3, 20, 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_changes_nothing(backend, dtype, norm):
    tensors = OPS["muon"].sample(rows=33, columns=20, dtype=dtype)
    before = [None if t is None else t.clone() for t in tensors]
    with use_backend(backend):
        OPS["muon"](*tensors, torch.tensor(norm), lr=1.0, max_norm=1.0)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_clipped_and_rate_multiplies_lr(backend):
    param, grad, _, momentum = OPS["muon"].sample(rows=33, columns=20)
    clipped, plain = ([t.clone() for t in (param, grad, momentum)] for _ in range(2))
    norm = grad.norm()
    with use_backend(backend):
        OPS["muon"](clipped[0], clipped[1], None, clipped[2], norm, torch.tensor(0.5), lr=0.2, max_norm=0.25)
        OPS["muon"](plain[0], grad * (0.25 / (norm + 1e-6)), None, plain[2], lr=0.1)
    torch.testing.assert_close(clipped[0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clipped[2], plain[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 520), (520, 300), (257, 257), (600, 513)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_skipped_blocks_change_no_bit(shape, dtype):
    """Sides above and below one thread's; one past a block. The product of a symmetric matrix skips blocks."""
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.manual_seed(5)
            torch.set_num_threads(count)
            tensors = OPS["muon"].sample(*shape, dtype=dtype)
            with use_backend("cpu"):
                OPS["muon"](*tensors, lr=1.0)
            results.append(tensors[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_matrices_that_are_updated_side_by_side_share_no_memory(threads):
    """Mutation that makes it fail: one scratch for all threads."""
    results = []
    for count in (1, 2, 4):
        threads(count)
        params = parameters([(200, 240)] * 9)
        optimizer = Muon([group_of(params)], lr=0.02)
        set_gradients(params, 0)
        with use_backend("cpu"):
            optimizer.step()
        results.append(torch.stack([p.detach() for p in params]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", VARIANTS)
def test_matrices_are_the_weights_of_linear_layers_in_blocks(name):
    model = GPT(GPTConfig(**{**SIZES, **VARIANTS[name]}))
    matrices = block_matrices(model)
    names = {n for n, p in model.named_parameters() if p in matrices}
    assert names == {n for n, p in model.named_parameters() if ".h." in n and n.endswith(".weight") and p.dim() > 1
                     and "relative_bias" not in n and ".relative.weight" not in n}  # fmt: skip
    assert sum(p.numel() for p in matrices) == matrix_count(model.config)
    fused = {n: rows for n, p in model.named_parameters() if (rows := matrices.get(p)) is not None}
    assert len(fused) == 2 and all(n.endswith("c_attn.weight") for n in fused)
    assert all(sum(rows) == model.get_parameter(n).shape[0] for n, rows in fused.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_update_does_not_depend_on_the_size_of_the_gradient(backend):
    """Mutation that makes it fail: the least norm is 1e-3 instead of 1e-7."""
    param, grad, _, momentum = OPS["muon"].sample(rows=33, columns=20)
    params = [param.clone() for _ in range(2)]
    with use_backend(backend):
        for p, factor in zip(params, (1.0, 2.0**-16), strict=True):
            OPS["muon"](p, grad * factor, None, torch.zeros_like(momentum), lr=0.1)
    torch.testing.assert_close(*params, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_below_max_norm_stays_as_it_is(backend):
    """Mutation that makes it fail: the gradient is scaled up to max_norm."""
    param, grad, _, momentum = OPS["muon"].sample(rows=33, columns=20)
    clipped, plain = ([t.clone() for t in (param, momentum)] for _ in range(2))
    with use_backend(backend):
        OPS["muon"](clipped[0], grad, None, clipped[1], torch.tensor(0.5), lr=0.1, max_norm=1.0)
        OPS["muon"](plain[0], grad, None, plain[1], lr=0.1)
    assert all(torch.equal(*pair) for pair in zip(clipped, plain, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lower_half_of_the_master_counts(backend):
    """Mutation that makes it fail: the update begins from the bfloat16 parameter alone."""
    param, grad, remainder, momentum = OPS["muon"].sample(rows=33, columns=20, dtype=torch.bfloat16)
    before = param.clone(), remainder.clone()
    with use_backend(backend):
        OPS["muon"](param, grad, remainder, momentum, lr=0.0)
    assert torch.equal(param, before[0]) and torch.equal(remainder, before[1]) and remainder.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_newton_schulz_steps_the_update_has_norm_1(backend, dtype):
    param, grad, remainder, momentum = OPS["muon"].sample(rows=33, columns=20, dtype=dtype)
    before = param.float() if remainder is None else join(param, remainder)
    before = before.clone()
    with use_backend(backend):
        OPS["muon"](param, grad, remainder, momentum, lr=1.0, weight_decay=0.0, adjust_lr_fn="original", ns_steps=0)
    after = param if remainder is None else join(param, remainder)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    assert (before - after).norm() / (33 / 20) ** 0.5 == pytest.approx(1.0, rel=tolerance)



# ---- a training


def make_trainer(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, "n_layer": 1, "dropout": 0.1, **options.pop("model", {})}))
    config = TrainConfig(batch=4, tokens=8, lr=1e-2, dtype=dtype, optimizer="muon", **options)
    return Trainer(model, config, steps=20)


def train(trainer, steps):
    losses = []
    for step in range(trainer.steps_done, trainer.steps_done + steps):
        torch.manual_seed(step)  # of batch and dropout
        ids = torch.randint(37, (4, 9))
        losses.append(float(trainer.step(ids[:, :-1], ids[:, 1:])))
    return losses


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "micro_batch": 2}], ids=["plain", "average"])
def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(dtype, options):
    """Recorded steps too. Mutation that makes it fail: a state without momentum_buffer."""
    whole, first, resumed = (make_trainer(dtype, **options) for _ in range(3))
    expected = train(whole, 10)
    train(first, 5)
    weights = {name: tensor.clone() for name, tensor in first.saved_weights()}
    state = copy.deepcopy(first.state_dict())
    train(resumed, 2)  # another state, which is replaced
    resumed.load_saved_weights(weights)
    resumed.load_state_dict(state)
    assert train(resumed, 5) == expected[5:]
    assert all(torch.equal(a, whole.master_weights()[n]) for n, a in resumed.master_weights().items())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model", [{}, {"experts": 3, "experts_per_token": 2, "experts_every": 1, "n_inner": 16}],
                         ids=["dense", "experts"])  # fmt: skip
def test_a_recorded_step_has_the_bits_of_one_that_runs(model):
    recorded, running = make_trainer(model=model), make_trainer(model=model)
    running.update.obstacle = "a test"
    assert train(recorded, 6) == train(running, 6)
    assert recorded.update.obstacle is None and recorded.update.calls
    assert all(torch.equal(a, running.master_weights()[n]) for n, a in recorded.master_weights().items())


def test_a_step_with_a_non_finite_gradient_changes_no_weight_and_no_momentum():
    trainer = make_trainer()
    train(trainer, 3)
    before = copy.deepcopy((trainer.master_weights(), trainer.optimizer.state_dict()["state"]))
    bias = trainer.model.transformer.ln_f.bias.data
    bias[0] = math.inf
    train(trainer, 1)
    bias[0] = before[0]["transformer.ln_f.bias"][0]
    after = trainer.master_weights(), trainer.optimizer.state_dict()["state"]
    assert not math.isfinite(trainer.grad_norm)
    assert all(torch.equal(a, after[0][n]) for n, a in before[0].items())
    assert all(torch.equal(t, after[1][i][n]) for i, entry in before[1].items() for n, t in entry.items())


def test_matrices_have_their_own_learning_rate_and_follow_the_schedule():
    trainer = make_trainer(matrix_lr=0.03)
    lrs = [(group["lr"], bool(group.get("use_muon"))) for group in trainer.optimizer.param_groups]
    assert set(lrs) == {(0.03, True), (0.01, False)}
    train(trainer, 2)
    trainer.optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(ValueError, match="lr of a parameter group is not"):
        train(trainer, 1)


def test_state_of_another_optimizer_is_refused():
    state = make_trainer().state_dict()
    adamw = Trainer(make_trainer().model, TrainConfig(batch=4, tokens=8, lr=1e-2), steps=20)
    with pytest.raises(ValueError, match="the state has groups of"):
        adamw.load_state_dict(state)
    torch_state = torch.optim.AdamW(parameters([(4, 4)]), lr=0.1)
    set_gradients(torch_state.param_groups[0]["params"], 0)
    torch_state.step()
    with pytest.raises(ValueError, match="state 0 has step, exp_avg, exp_avg_sq, expected momentum_buffer"):
        Muon([group_of(parameters([(4, 4)]))], lr=0.1).load_state_dict(torch_state.state_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("matrix_lr", 0.1),
        ("momentum", 0.5),
        ("nesterov", False),
        ("ns_steps", 3),
        ("adjust_lr_fn", "original"),
        ("ns_coefficients", (2.0, -1.5, 0.5)),
    ],
)
def test_options_of_muon_are_refused_for_adamw(name, value):
    TrainConfig(optimizer="muon", **{name: value})
    with pytest.raises(ValueError, match=f"{name} is .*, expected optimizer muon"):
        TrainConfig(**{name: value})


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="optimizer is muon: got a model without linear layers in blocks"):
        Trainer(nn.Linear(3, 3), TrainConfig(optimizer="muon"), steps=3)


def test_errors_name_the_optimizer():
    """Regression: those of Muon's groups and states began with AdamW."""
    params = parameters(SHAPES[:2])
    optimizer = Muon([group_of(params)], lr=0.02)
    with pytest.raises(ValueError, match=r"^Muon: max_norm is -1"):
        Muon([group_of(params)], max_norm=-1)
    with pytest.raises(ValueError, match=r"^Muon: weight_decay is -1"):
        optimizer.add_param_group({**group_of([nn.Parameter(torch.ones(2, 2))]), "weight_decay": -1})
    with pytest.raises(ValueError, match=r"^Muon: got a tensor of shape \(3,\)"):
        optimizer.master(torch.ones(3))
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    other = {**state, "state": {0: {"momentum_buffer": torch.ones(2)}}}
    with pytest.raises(ValueError, match=r"^Muon: momentum_buffer of state 0 has shape \(2,\)"):
        optimizer.load_state_dict(other)
    with pytest.raises(ValueError, match=r"^Muon: the state has groups of"):
        optimizer.load_state_dict({**state, "param_groups": []})
    params[0].grad = torch.zeros(params[0].shape).to_sparse()
    with pytest.raises(ValueError, match=r"^Muon: got a gradient of layout torch\.sparse"):
        optimizer.step()


def test_a_compiled_step_updates_every_parameter():
    """Mutation that makes it fail: `as_subclass`, which torch.compile does not trace, in matrix_tensors."""
    plain, compiled = parameters(SHAPES[:2]), parameters(SHAPES[:2])
    a, b = (Muon([group_of(params)], lr=0.02) for params in (plain, compiled))
    step = torch.compile(b.step, backend="eager")
    for index in range(3):
        for params in (plain, compiled):
            set_gradients(params, index)
        a.step()
        step()
        assert all(torch.equal(x, y) for x, y in zip(plain, compiled, strict=True))


def test_frozen_blocks_and_parameters_without_a_gradient_stay_as_they_are():
    model = GPT(GPTConfig(**SIZES))
    model.transformer.h[0].requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, TrainConfig(batch=4, tokens=8, lr=1e-2, optimizer="muon"), steps=20)
    train(trainer, 2)
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == {n for n in before if ".h.0." in n}
    params = parameters(SHAPES[:2])
    optimizer, value = Muon([group_of(params)], lr=0.02), params[0].clone()
    set_gradients(params[1:], 0)
    optimizer.step()
    assert torch.equal(params[0], value) and not optimizer.state.get(params[0])
