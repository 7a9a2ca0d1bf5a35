"""The emulated device itself: what it refuses and counts; the other cases depend on it."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests import emulated

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def device():
    torch.set_num_threads(1)
    return emulated.register()


REFUSED = {
    "sum": lambda x, cpu: x + cpu,
    "sum into a tensor of the CPU": lambda x, cpu: cpu.add_(x),
    "product": lambda x, cpu: x @ cpu.t(),
    "where": lambda x, cpu: torch.where(cpu > 0, x, x),
    "masked_fill": lambda x, cpu: x.masked_fill(cpu > 0, 0.0),
    "cat": lambda x, cpu: torch.cat([x, cpu]),
    "stack of numbers": lambda x, cpu: torch.stack([x.sum(), cpu.sum()]),
    "index_select": lambda x, cpu: x.index_select(0, torch.tensor([0])),
    "gather": lambda x, cpu: x.gather(1, torch.zeros(2, 1, dtype=torch.int64)),
    "index_copy": lambda x, cpu: x.index_copy(0, torch.tensor([0]), x[:1]),
    "embedding": lambda x, cpu: torch.nn.functional.embedding(torch.tensor([1]), x),
    "index of the device": lambda x, cpu: cpu[torch.tensor([0], device=x.device)],
    "value put": lambda x, cpu: x.index_put_((torch.tensor([0], device=x.device),), cpu[:1]),
    "out": lambda x, cpu: torch.add(x, x, out=cpu),
    "attention": lambda x, cpu: torch.nn.functional.scaled_dot_product_attention(x[None], cpu[None], x[None]),
    "linear layer": lambda x, cpu: torch.nn.Linear(3, 2)(x),
    "foreach": lambda x, cpu: torch._foreach_add_([x], [cpu]),
    "integers multiplied": lambda x, cpu: x.long() @ x.long().t(),
    "numpy": lambda x, cpu: x.numpy(),
    "array": lambda x, cpu: np.asarray(x),
    "from storage": lambda x, cpu: x.set_(cpu.untyped_storage()),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_a_gpu_would_refuse_it(what, device):
    with pytest.raises(
        (RuntimeError, TypeError), match=r"same device|on cpu or on|on the device of|not multiply|numpy|storage on"
    ):
        REFUSED[what](torch.ones(2, 3, device=device), torch.ones(2, 3))


ACCEPTED = {
    "a number": lambda x: x * torch.tensor(2.0),
    "a number in where": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "indices of the CPU": lambda x: x[torch.tensor([1, 0])],
    "a list of indices": lambda x: x[[1, 0]],
    "a number put": lambda x: x.clone().index_put_((torch.tensor([1]),), torch.tensor(5.0)),
    "copies": lambda x: torch.ones(2, 3).copy_(x).to(x.device),
    "views": lambda x: x.t()[1:].unsqueeze(0).expand(2, -1, -1).reshape(2, -1).roll(1, -1),
    "write into a view": lambda x: x.clone().t()[1:].add_(1).t(),
    "resized result": lambda x: torch.add(x, x, out=torch.empty(0, device=x.device)),
    "sort and top": lambda x: x.sort(-1, descending=True).values + x.topk(3).values,
    "data": lambda x: torch.nn.Parameter(torch.zeros(2)).__class__(x).data,
}


@pytest.mark.parametrize("what", list(ACCEPTED))
def test_a_gpu_would_compute_it(what, device):
    x = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(ACCEPTED[what](x.to(device)).cpu(), ACCEPTED[what](x))


COUNTED = {
    "item": lambda x: (float(x.sum()), bool((x > 0).any()), x[0, 0].item()),
    "to host": lambda x: (x.cpu(), x.tolist(), torch.empty(2, 3).copy_(x)),
    "to device": lambda x: (torch.ones(2).to(x.device), torch.tensor([1], device=x.device), x.copy_(torch.ones(2, 3))),
    "to device, not waited for": lambda x: 3 * [torch.ones(2).to(x.device, non_blocking=True)] and None,
    "nonzero": lambda x: (x.nonzero(), x[x > 0], x.index_put_((x > 0,), x[x > 0])),
    "to device ": lambda x: (x[torch.tensor([0])], x[[1]], x.index_put_((torch.tensor([1]),), x[:1] + 1)),
    "bincount": lambda x: torch.bincount(x.long().flatten()),
    "_unique2": lambda x: torch.unique(x),
}


def test_device_syncs_are_counted(device):
    expected = {name: 3 for name in COUNTED} | {
        "to device, not waited for": 1,
        "nonzero": 4,
        "bincount": 1,
        "_unique2": 1,
    }
    for name, syncs in COUNTED.items():
        with emulated.counted() as reads:
            syncs(torch.ones(2, 3, device=device))
        assert reads.of(name.strip()) == expected[name], (name, reads.seen)
        assert all("cases.py" in where for _, where in reads.seen), "attributed to the line of the caller"
    with emulated.counted() as reads:
        x = torch.zeros(2, 3, device=device)
        y = torch.where(x > 0, x, 1.0).masked_fill_(x > 1, 0.0)[0, 1:] + torch.arange(2, device=device)
        x[0] = 3.0
        x[x > 1] = 0.0  # a scalar assigned through a mask
        y.gather(0, y.long().clamp(max=1)).cumsum(0).argsort()
        torch.full((2,), 1.0, device=device).index_add_(0, torch.arange(2, device=device), y)
    assert len(reads) == 0, reads.seen


def test_new_memory_is_nan(device):
    assert bool(torch.empty(3, 5, device=device).isnan().all())
    assert torch.empty(2, dtype=torch.int64, device=device).tolist() == [-1, -1]


def test_layers_optimizers_and_checkpointing_compute_what_the_cpu_computes(device):
    def ends(where, **how):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        net.to(where)
        optimizer = torch.optim.AdamW(net.parameters(), **how)
        inputs = torch.randn(5, 4).to(where)
        for _ in range(5):
            checkpoint(net, inputs, use_reentrant=False).log_softmax(-1)[:, 0].mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().cpu() for parameter in net.parameters()]

    for how in ({"foreach": True}, {"foreach": False}, {"fused": True}):
        torch.testing.assert_close(ends(device, **how), ends(CPU, **how))


def test_autocast_has_the_lists_of_cuda(device):
    x = torch.randn(3, 3, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.is_autocast_enabled(device.type) and not torch.is_autocast_enabled("cpu")
        assert (x @ x).dtype == torch.bfloat16 and torch.nn.functional.linear(x, x).dtype == torch.bfloat16
        assert (x @ x).softmax(-1).dtype == (x @ x).exp().dtype == torch.float32
    assert (x @ x).dtype == torch.float32
