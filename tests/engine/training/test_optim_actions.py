"""What users of torch.optim.AdamW do between two steps: the same values and the same saved keys with peakgpt.AdamW.

Each action runs after some steps and before some more, with both optimizers. Most fail if the parameters are views of
one buffer, or if the optimizer keeps addresses of memory that a parameter no longer has.
"""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import peakgpt

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = (torch.optim.AdamW, peakgpt.AdamW)
OPTIONS = {"lr": 0.05, "weight_decay": 0.1}


class Net(nn.Module):
    """An embedding tied to the head, a convolution in channels_last, a frozen part, and a part that is rarely used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.middle = nn.Linear(6, 6)
        self.rare = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids, use_rare):
        x = self.frozen(self.middle(self.wte(ids)))
        image = self.conv(x.reshape(1, 2, -1, 3))
        x = x + image.mean() * 0.1
        return self.head(self.rare(x) if use_rare else x)


def train(model, optimizer, steps, first=0):
    """Make steps; gradients are those of batches `first` .. `first + steps - 1`."""
    for step in range(first, first + steps):
        ids = torch.arange(12).reshape(2, 6) * (step + 3) % 11
        optimizer.zero_grad()
        dtype = model.wte.weight.dtype
        nn.functional.cross_entropy(model(ids, step % 2 == 0).flatten(0, 1).float(), ids.flatten()).backward()
        assert model.wte.weight.grad.dtype == dtype
        optimizer.step()


def through_bytes(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


# ---- actions: (model, optimizer, folder) -> (model, optimizer) or None for the same ones


def replaced_data(model, optimizer, folder):
    for p in model.parameters():
        p.data = p.data.clone()


def data_in_a_flat_buffer(model, optimizer, folder):
    """As DeepSpeed, Apex and FSDP flatten parameters: `flat` must follow the updates."""
    params = list(model.parameters())
    flat = torch._utils._flatten_dense_tensors([p.data.contiguous() for p in params])
    for p, view in zip(params, torch._utils._unflatten_dense_tensors(flat, params), strict=True):
        p.data = view
    model.flat = flat


def data_with_an_offset(model, optimizer, folder):
    """An odd offset: no address is a multiple of 16 bytes."""
    for p in model.parameters():
        memory = torch.zeros(p.numel() + 1, dtype=p.dtype)
        memory[1:] = p.data.flatten()
        p.data = memory[1:].view(p.shape)


def data_with_gaps(model, optimizer, folder):
    for p in model.parameters():
        memory = torch.zeros(*p.shape, 2, dtype=p.dtype)
        memory[..., 0] = p.data
        p.data = memory[..., 0]


def transposed_data(model, optimizer, folder):
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def two_parameters_with_one_memory(model, optimizer, folder):
    model.rare.weight.data = model.middle.weight.data
    model.rare.bias.data = model.middle.bias.data


def vector_round_trip(model, optimizer, folder):
    params = [p for p in model.parameters() if p.is_contiguous()]
    vector = nn.utils.parameters_to_vector(params)
    nn.utils.vector_to_parameters(vector.clone(), params)


def loaded_strict(model, optimizer, folder):
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})


def loaded_assign(model, optimizer, folder):
    """The old parameters stay in the optimizer, as in torch."""
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)
    model.head.weight = model.wte.weight


def swapped(model, optimizer, folder):
    optimizer.zero_grad()
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 0.5, requires_grad=p.requires_grad))


def storage_freed_and_back(model, optimizer, folder):
    """As FSDP frees unsharded parameters."""
    for p in model.parameters():
        values, storage = p.detach().clone(), p.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        with torch.no_grad():
            p.copy_(values)


def shared_memory(model, optimizer, folder):
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    model.shared = [p.detach() for p in model.parameters()]  # other processes see this memory


def deepcopied(model, optimizer, folder):
    return copy.deepcopy((model, optimizer))


def pickled(model, optimizer, folder):
    return pickle.loads(pickle.dumps((model, optimizer)))


def saved_by_torch(model, optimizer, folder):
    return through_bytes((model, optimizer))


def states_through_torch(model, optimizer, folder):
    again = Net()
    other = type(optimizer)(again.parameters(), lr=9.0)
    again.load_state_dict(through_bytes(model.state_dict()))
    other.load_state_dict(through_bytes(optimizer.state_dict()))
    return again, other


def safetensors_model(model, optimizer, folder):
    save_model(model, f"{folder}/model.safetensors")
    loaded_strict(model, optimizer, folder)
    assert load_model(model, f"{folder}/model.safetensors") == (set(), [])


def safetensors_file(model, optimizer, folder):
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "head.weight"}
    save_file(state, f"{folder}/model.safetensors")
    moments = {f"{i}.{k}": v for i, p in enumerate(model.parameters()) for k, v in optimizer.state[p].items()}
    save_file({k: v.contiguous() for k, v in moments.items()}, f"{folder}/state.safetensors")
    model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    assert load_file(f"{folder}/state.safetensors").keys() == moments.keys()


def accelerate_state(model, optimizer, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, _ = accelerator.prepare(model, optimizer)
    accelerator.save_state(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(folder)
    accelerator.save_model(model, f"{folder}/model")


def exchanged_state(model, optimizer, folder):
    """To the other class and back."""
    other = OPTIMIZERS[optimizer is not None and isinstance(optimizer, torch.optim.AdamW)]
    middle = other(model.parameters(), lr=7.0)
    middle.load_state_dict(optimizer.state_dict())
    again = type(optimizer)(model.parameters(), lr=8.0)
    again.load_state_dict(middle.state_dict())
    return model, again


def averaged(model, optimizer, folder):
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    average.update_parameters(model)
    assert torch.equal(average.module.middle.weight, model.middle.weight)
    model.load_state_dict(average.module.state_dict())


def frozen_and_thawed(model, optimizer, folder):
    model.middle.requires_grad_(False)
    train(model, optimizer, 2, first=2)
    model.middle.requires_grad_(True)
    model.frozen.requires_grad_(True)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.5})


def added_group(model, optimizer, folder):
    new = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    new.grad = torch.ones(3)


def changed_options(model, optimizer, folder):
    for group in optimizer.param_groups:
        group.update(lr=0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.5)


def tensor_lr(model, optimizer, folder):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.02)


def reset_state(model, optimizer, folder):
    optimizer.state.clear()


def replaced_gradients(model, optimizer, folder):
    for p in model.parameters():
        if p.grad is not None:
            p.grad = torch.ones_like(p)[..., :1].expand(p.shape)
    optimizer.step()


def scaled_and_clipped(model, optimizer, folder):
    """Between a step without `rare` and one with it: zeros must not count as gradients."""
    train(model, optimizer, 1, first=2)
    optimizer.zero_grad()
    model(torch.arange(12).reshape(2, 6) % 11, False).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()


def scheduled(model, optimizer, folder):
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=10)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        schedule.step()
    schedule.load_state_dict(copy.deepcopy(schedule.state_dict()))


def compiled_model(model, optimizer, folder):
    compiled = torch.compile(model, backend="eager")
    train(compiled, optimizer, 2, first=2)


def hooks_of_steps(model, optimizer, folder):
    counts = []
    optimizer.register_step_pre_hook(lambda *_: counts.append("pre"))
    optimizer.register_step_post_hook(lambda *_: counts.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: counts.append("load") or copy.deepcopy(state))
    optimizer.register_load_state_dict_post_hook(lambda _: counts.append("loaded"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert counts == ["pre", "post", "load", "loaded"]


def kept_zeros(model, optimizer, folder):
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


ACTIONS = [
    replaced_data, data_in_a_flat_buffer, data_with_an_offset, data_with_gaps, transposed_data, vector_round_trip,
    two_parameters_with_one_memory, loaded_strict, loaded_assign, swapped, storage_freed_and_back, shared_memory,
    deepcopied, pickled, saved_by_torch, states_through_torch, safetensors_model, safetensors_file, accelerate_state,
    exchanged_state, averaged, frozen_and_thawed, added_group, changed_options, tensor_lr, reset_state,
    replaced_gradients, scaled_and_clipped, scheduled, compiled_model, hooks_of_steps, kept_zeros,
]  # fmt: skip


def after(optimizer_class, action, folder, steps_before):
    model = Net()
    optimizer = optimizer_class(model.parameters(), **OPTIONS)
    train(model, optimizer, steps_before)
    model, optimizer = action(model, optimizer, str(folder)) or (model, optimizer)
    train(model, optimizer, 3, first=5)
    return model, optimizer


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_an_action_between_steps_gives_the_values_and_keys_of_torch(action, steps_before, tmp_path):
    (model, optimizer), (reference, torchs) = (
        after(c, action, tmp_path, steps_before) for c in reversed(OPTIMIZERS)
    )  # fmt: skip
    state, expected = model.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert state[name].stride() == value.stride()
    for attribute in ("flat", "shared"):  # memory that others read
        for a, b in zip(getattr(model, attribute, ()), getattr(reference, attribute, ()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    entries, others = (o.state_dict()["state"] for o in (optimizer, torchs))
    assert {i: list(e) for i, e in entries.items()} == {i: list(e) for i, e in others.items()}
    for i, entry in others.items():
        for name, value in entry.items():
            torch.testing.assert_close(entries[i][name], value, rtol=1e-4, atol=1e-6)


def test_parameters_with_one_memory_are_updated_one_after_the_other():
    """Two threads of one launch could update both at once, so they must not get one launch."""
    results = []
    for make in OPTIMIZERS:
        values = torch.ones(1000)
        params = [nn.Parameter(values[:-1]), nn.Parameter(values[1:])]
        optimizer = make(params, lr=0.5)
        for _ in range(2):
            for p in params:
                p.grad = torch.arange(p.numel()) % 7 - 3.0
            optimizer.step()
        results.append(values)
    torch.testing.assert_close(*results)
    assert [update.prepared.table for _, update in optimizer._launches.values()] == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", ["model", "optimizer", "parameter", "state"])
def test_a_saved_file_is_no_larger_than_torchs(value, dtype):
    """Fails if a saved view writes the memory of all parameters."""
    sizes = []
    for make in OPTIMIZERS:
        model = nn.ModuleList(nn.Linear(64, 64) for _ in range(8)).to(dtype)
        optimizer = make(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        stream, first = io.BytesIO(), next(model.parameters())
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "parameter": first,
                    "state": optimizer.state[first]["exp_avg"]}[value], stream)  # fmt: skip
        sizes.append(stream.tell())
    float32_moments = dtype == torch.bfloat16 and value in ("optimizer", "state")
    wider = 2.5 if float32_moments else 1.02
    assert sizes[1] <= wider * sizes[0] + 512


@pytest.mark.parametrize("change", ["double", "bfloat16"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_model_may_change_its_dtype_between_steps(change, steps_before):
    """torch.optim.AdamW allows it before the first step only; the reference is in the new dtype from the start."""
    model, reference = Net(), Net().double()
    optimizer = peakgpt.AdamW(model.parameters(), **OPTIONS)
    torchs = torch.optim.AdamW(reference.parameters(), **OPTIONS)
    train(model, optimizer, steps_before)
    train(reference, torchs, steps_before)
    getattr(model, change)()
    optimizer.zero_grad()
    train(model, optimizer, 3, first=5)
    train(reference, torchs, 3, first=5)
    tolerance = 1e-5 if change == "double" else 0.1
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.dtype == getattr(torch, {"double": "float64"}.get(change, change))
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def hogwild(model):
    optimizer = peakgpt.AdamW(model.parameters(), lr=0.5)
    train(model, optimizer, 1)


def test_processes_that_share_memory_train_one_model():
    """Fails if the optimizer moves parameters: each process would train alone."""
    model = Net().share_memory()
    before = model.middle.weight.detach().clone()
    context = torch.multiprocessing.get_context("fork")
    process = context.Process(target=hogwild, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == 0 and not torch.equal(model.middle.weight, before)


def released(p):
    p.untyped_storage().resize_(0)


def reshaped(p):
    p.grad, p.data = None, torch.ones(2, 3)
    p.grad = torch.ones(2, 3)


def half(p):
    p.grad, p.data = None, p.data.half()
    p.grad = torch.ones_like(p)


def sparse(p):
    p.grad = torch.ones_like(p).to_sparse()


REFUSED = [
    (released, "param has shape (4, 3) and no memory"),
    (reshaped, "a parameter has shape (2, 3) and exp_avg has (4, 3)"),
    (half, "now torch.float16, expected float32, bfloat16 or float64"),
    (sparse, "gradient of layout torch.sparse_coo"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_changes_without_a_meaning_are_refused_in_one_sentence(change, message):
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = peakgpt.AdamW([weight])
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    change(weight)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        optimizer.step()


def test_dtensors_are_refused_in_one_sentence():
    """The parameters of FSDP2 and of tensor parallelism."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        weight = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
        with pytest.raises(ValueError, match="got a parameter of type DTensor, expected a plain tensor"):
            peakgpt.AdamW([weight])
    finally:
        torch.distributed.destroy_process_group()
