"""AdamW: torch's steps, torch's state format both ways, and changes that users make between two steps."""

import copy
import pickle

import pytest
import torch
from torch import nn

import peakgpt
from peakgpt.kernels.core.dispatch import load, use_backend
from peakgpt.kernels.ops.adamw import split

SHAPES = ((5, 7), (3,), (130,), (), (2, 3, 4))


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def accumulate(params, grads):
    """Add gradients by a backward pass; None gives a parameter no gradient."""
    loss = sum((p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None)
    loss.backward()


def groups(params):
    return [{"params": params[:2], "lr": 0.02, "weight_decay": 0.0}, {"params": params[2:], "betas": (0.8, 0.95)}]


def assert_equal(ours, torch_params):
    for i, (a, b) in enumerate(zip(ours, torch_params, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, i=i: f"parameter {i}: {m}")


@pytest.mark.parametrize("backend", ["eager", "cpu", "gpu"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_adamw_steps_equal_torch(backend, set_to_none):
    if backend != "eager" and isinstance(reason := load(backend, "adamw"), str):
        pytest.skip(reason)
    ours, torch_params = parameters(), parameters()
    a, b = peakgpt.AdamW(groups(ours), lr=0.01), torch.optim.AdamW(groups(torch_params), lr=0.01)
    with use_backend(backend):
        for step in range(5):
            for params, optimizer in ((ours, a), (torch_params, b)):
                accumulate(params, gradients(step))
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
            assert_equal(ours, torch_params)


def tensors_of(optimizer):
    """Return the parameters, gradients and state tensors of an optimizer."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(p.grad for p in params), *(t for p in params for t in optimizer.state[p].values())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_has_memory_of_its_own_and_keeps_it(dtype):
    """Fails if tensors are views of a common buffer: libraries then save one of them, or all of the buffer for each."""
    params = parameters()
    before = [p.data_ptr() for p in params]
    optimizer = peakgpt.AdamW(params, dtype=dtype)
    for step in range(2):
        accumulate(params, gradients(step, dtype))
        gradient_addresses = [p.grad.data_ptr() for p in params]
        optimizer.step()
        assert gradient_addresses == [p.grad.data_ptr() for p in params]
    assert dtype != torch.float32 or before == [p.data_ptr() for p in params]
    tensors = tensors_of(optimizer)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("how", ["model.zero_grad", "replace", "keep"])
def test_replaced_gradients_are_used(how):
    """Fails if the optimizer keeps the address of an old gradient."""
    ours, torch_params = parameters(), parameters()
    a, b = peakgpt.AdamW(ours, lr=0.01), torch.optim.AdamW(torch_params, lr=0.01)
    for step in range(4):
        for params, optimizer in ((ours, a), (torch_params, b)):
            if how == "replace":
                for p, g in zip(params, gradients(step), strict=True):
                    p.grad = g.clone()
            else:
                accumulate(params, gradients(step))
            optimizer.step()
            if how == "model.zero_grad":
                for p in params:
                    p.grad = None
        assert_equal(ours, torch_params)


@pytest.mark.parametrize("reset", ["optimizer", "none"])
def test_parameters_without_gradient_are_skipped_as_in_torch(reset):
    """Each then has its own step count. Fails if parameters share counters."""
    ours, torch_params = parameters(), parameters()
    a, b = peakgpt.AdamW(ours, lr=0.01, max_norm=1.0), torch.optim.AdamW(torch_params, lr=0.01)
    missing = [(), (1,), (0, 2, 4), (1, 2), (), (3,), (0, 1, 2, 3, 4), ()]
    for step, without in enumerate(missing):
        for params, optimizer in ((ours, a), (torch_params, b)):
            if reset == "none":
                for p in params:
                    p.grad = None
            else:
                optimizer.zero_grad()
            grads = [None if i in without else g for i, g in enumerate(gradients(step))]
            if len(without) < len(SHAPES):
                accumulate(params, grads)
            if optimizer is b and len(without) < len(SHAPES):
                norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
                torch.testing.assert_close(a.grad_norm, norm)
            optimizer.step()
        assert_equal(ours, torch_params)
    counts = [int(a.state[p]["step"]) for p in ours]
    assert counts == [int(b.state[p]["step"]) for p in torch_params]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_parameter_without_gradient_is_unchanged(set_to_none):
    """Fails if zero_grad gives it zeros: clip_grad_norm_ writes to them, and weight decay then shrinks it."""
    used, frozen, unused = (nn.Parameter(torch.ones(4)) for _ in range(3))
    frozen.requires_grad_(False)
    params = [used, frozen, unused]
    optimizer = peakgpt.AdamW(params, lr=0.1, weight_decay=0.5)
    for step in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        (used * used).sum().backward()
        if step:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert torch.equal(frozen, torch.ones(4)) and torch.equal(unused, torch.ones(4)) and used[0] < 1
    assert (used.grad is None) == set_to_none and frozen.grad is None and unused.grad is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copied_optimizer_continues(how):
    """Fails if the copy has no flat buffers, or views of the original's buffers."""
    params = parameters(torch.bfloat16)
    optimizer = peakgpt.AdamW(params, lr=0.01, max_norm=1.0)
    accumulate(params, gradients(0, torch.bfloat16))
    optimizer.step()
    others, other = how((params, optimizer))
    for some, one in ((params, optimizer), (others, other)):
        one.zero_grad()
        accumulate(some, gradients(1, torch.bfloat16))
        one.step()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(optimizer.master(a), other.master(b)) and a.data_ptr() != b.data_ptr()


def test_clipping_is_over_all_groups():
    ours, torch_params = parameters(), parameters()
    a, b = peakgpt.AdamW(groups(ours), lr=0.01, max_norm=0.5), torch.optim.AdamW(groups(torch_params), lr=0.01)
    for step in range(3):
        accumulate(ours, gradients(step))
        accumulate(torch_params, gradients(step))
        norm = torch.nn.utils.clip_grad_norm_(torch_params, 0.5)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
        assert_equal(ours, torch_params)
        a.zero_grad()
        b.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_elements_is_exact(dtype):
    """Fails if the norm is one call of torch over the whole buffer."""
    big, small = (nn.Parameter(torch.zeros(count, dtype=dtype)) for count in (20_000_003, 7))
    optimizer = peakgpt.AdamW([big, small], max_norm=1.0)
    generator = torch.Generator().manual_seed(0)
    for p in (big, small):
        p.grad = torch.empty_like(p).normal_(0.0, 1e-3, generator=generator)
    expected = sum(float(p.grad.double().square().sum()) for p in (big, small)) ** 0.5
    optimizer.step()
    assert abs(float(optimizer.grad_norm) / expected - 1) < 2e-5


def test_a_norm_that_is_not_finite_skips_the_step():
    params = parameters()
    optimizer = peakgpt.AdamW(params, max_norm=1.0)
    accumulate(params, gradients(0))
    params[1].grad[0] = float("nan")
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert int(optimizer.state[params[0]]["step"]) == 0 and optimizer.grad_norm.isnan()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_torch_adamw_loads_the_state_and_the_reverse(set_to_none):
    ours, torch_params = parameters(), parameters()
    a, b = peakgpt.AdamW(groups(ours), lr=0.01), torch.optim.AdamW(groups(torch_params), lr=0.01)
    for step in range(3):
        accumulate(torch_params, gradients(step))
        b.step()
        b.zero_grad()
    with torch.no_grad():
        for p, q in zip(ours, torch_params, strict=True):
            p.copy_(q)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    again = parameters()
    with torch.no_grad():
        for p, q in zip(again, torch_params, strict=True):
            p.copy_(q)
    c = torch.optim.AdamW(groups(again), lr=0.5)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in range(3, 5):
        for params, optimizer in ((ours, a), (torch_params, b), (again, c)):
            optimizer.zero_grad(set_to_none=set_to_none)
            accumulate(params, gradients(step))
            optimizer.step()
        assert_equal(ours, torch_params)
        assert_equal(again, torch_params)


def test_torch_schedulers_and_closures_work():
    ours, torch_params = parameters(), parameters()
    optimizers = [peakgpt.AdamW(ours, lr=0.01), torch.optim.AdamW(torch_params, lr=0.01)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 4) for o in optimizers]
    for step in range(4):
        losses = []
        for params, optimizer, schedule in zip((ours, torch_params), optimizers, schedules, strict=True):

            def closure(params=params, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = sum((p * g).sum() for p, g in zip(params, gradients(step), strict=True))
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).detach())
            schedule.step()
        torch.testing.assert_close(*losses)
        assert_equal(ours, torch_params)


def test_bfloat16_parameters_have_a_float32_master():
    """A hundred steps too small for bfloat16 add up in the master."""
    parameter = nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
    optimizer = peakgpt.AdamW([parameter], lr=1e-4, weight_decay=0.0)
    wide = nn.Parameter(torch.ones(70))
    reference = torch.optim.AdamW([wide], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad, wide.grad = torch.ones(70, dtype=torch.bfloat16), torch.ones(70)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(optimizer.master(parameter), wide.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(parameter, split(optimizer.master(parameter))[0])


def test_values_written_to_parameters_between_steps_are_used():
    """Also values written to .data, as in pruning. Fails if the next step restores the old master."""
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    optimizer = peakgpt.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, dtype=torch.bfloat16)
    mask = (torch.rand(40, 50) < 0.5).bfloat16()
    for _ in range(3):
        model.weight.grad, model.bias.grad = torch.ones_like(model.weight) * mask, torch.ones_like(model.bias)
        model.weight.data.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
    assert (model.weight * (1 - mask)).abs().max() < 1e-38
    with torch.no_grad():
        model.weight.mul_(2)
    assert (optimizer.master(model.weight) / model.weight - 1)[mask.bool()].abs().max() <= 2**-8


def test_dtype_casts_the_model_and_keeps_a_float32_master():
    model = peakgpt.GPT(peakgpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=31))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = model.configure_optimizer(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    masters = optimizer.master_weights(model)
    assert all(torch.equal(masters[name], tensor) for name, tensor in before.items())
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all((decays[p] > 0) == (p.dim() >= 2) for p in model.parameters())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_loaded_after_the_optimizer_was_built_are_used(assign, dtype):
    """Fails if the next step overwrites them with an old master, or writes to memory of the old value."""
    model = nn.Linear(6, 5).to(dtype)
    optimizer = peakgpt.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    new = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    if assign:
        for name, parameter in model.named_parameters():
            parameter.data = new[name].clone()
    else:
        model.load_state_dict(new)
    model(torch.randn(2, 6, dtype=dtype)).sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, new[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("weights_first", [True, False])
def test_masters_survive_loading_in_either_order(weights_first):
    """Fails if weights loaded after the optimizer's state round the masters."""
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    optimizer = peakgpt.AdamW(model.parameters(), dtype=torch.bfloat16)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = nn.Linear(30, 20)
    resumed = peakgpt.AdamW(again.parameters(), dtype=torch.bfloat16)
    if weights_first:
        again.load_state_dict(weights)
    resumed.load_state_dict(state)
    if not weights_first:
        again.load_state_dict(weights)
    for m, o in ((model, optimizer), (again, resumed)):
        m.weight.grad = torch.ones_like(m.weight)
        o.step()
    assert torch.equal(resumed.master(again.weight), optimizer.master(model.weight))


def test_a_state_with_unsplit_masters_loads():
    """Older versions saved such states. A remainder that was cast to another dtype is refused."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))
    optimizer, master = peakgpt.AdamW([weight], lr=0.0), torch.randn(300)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    entry = state["state"][0]
    entry["remainder"] = entry["remainder"].bfloat16()
    with pytest.raises(ValueError, match=r"remainder of state 0 has dtype torch.bfloat16, expected torch.int16"):
        optimizer.load_state_dict(state)
    del entry["remainder"]
    entry["master"] = master
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.master(weight), master) and torch.equal(weight, split(master)[0])


def test_autograd_detects_that_a_step_changed_parameters():
    weight = nn.Parameter(torch.ones(3))
    optimizer = peakgpt.AdamW([weight], lr=0.1)
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


BAD = [
    ({"lr": -1.0}, "lr is -1.0, expected at least 0"),
    ({"betas": (0.9, 1.0)}, "betas are"),
    ({"amsgrad": True}, "amsgrad is True, expected False"),
    ({"maximize": True}, "maximize is True, expected False"),
    ({"max_norm": 0.0}, "max_norm is 0.0, expected more than 0"),
    ({"dtype": torch.float16}, "dtype is torch.float16, expected torch.float32 or torch.bfloat16"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        peakgpt.AdamW(parameters(), **options)


def test_optimizer_states_that_do_not_fit_are_refused():
    params = parameters()
    optimizer = peakgpt.AdamW(params)
    accumulate(params, gradients(0))
    momentum = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    momentum.step()
    with pytest.raises(ValueError, match="expected step, exp_avg, exp_avg_sq"):
        optimizer.load_state_dict(momentum.state_dict())
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"exp_avg of state 0 has shape \(4,\), expected \(5, 7\)"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"groups of \[2, 3\] parameters, expected \[5\]"):
        optimizer.load_state_dict(torch.optim.AdamW(groups(parameters())).state_dict())
    with pytest.raises(ValueError, match="amsgrad is True"):
        optimizer.load_state_dict(torch.optim.AdamW(parameters(), amsgrad=True).state_dict())
    moved = nn.Parameter(torch.ones(2))
    optimizer = peakgpt.AdamW([moved])
    moved.data = moved.data.half()
    moved.grad = torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"now torch.float16, expected float32, bfloat16 or float64"):
        optimizer.step()


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "differentiable"])
def test_an_option_that_is_set_later_is_refused(name):
    """Regression: `param_groups[0]["maximize"] = True` was ignored, and the loss fell."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = peakgpt.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    before = parameter.detach().clone()
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match=f"{name} is True, expected False"):
        optimizer.step()
    assert torch.equal(parameter, before)
