"""`SharpnessAware` with what training loops use, each against a plain loop that takes the two passes by hand."""

import copy
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from saftnb.finetune import SharpnessAware

RHO, LR = 0.3, 0.2


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()


def data(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, generator=draw, dtype=torch.float64), torch.randint(3, (rows,), generator=draw)


def gradients(model: nn.Module, batches) -> list[torch.Tensor]:
    """Of the mean loss over all rows, batch by batch."""
    model.zero_grad()
    rows = sum(len(labels) for _, labels in batches)
    for inputs, labels in batches:
        (nn.functional.cross_entropy(model(inputs), labels, reduction="sum") / rows).backward()
    return [p.grad.clone() for p in model.parameters()]


def plain_step(model: nn.Module, batches, *, hold: bool = False) -> None:
    """ASAM around SGD, written out: ε = ρ w² g / ‖w g‖, the gradient there, the step from w."""
    first = gradients(model, batches)
    weights = [p.detach().clone() for p in model.parameters()]
    length = sum((w * g).square().sum() for w, g in zip(weights, first, strict=True)).sqrt()
    before = copy.deepcopy(list(model.buffers()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), first, strict=True):
            p += RHO * p.square() * g / length
    second = gradients(model, batches)
    with torch.no_grad():
        for p, w, g in zip(model.parameters(), weights, second, strict=True):
            p.copy_(w - LR * g)
        if hold:
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)


def closure_of(model: nn.Module, optimizer: SharpnessAware, batches):
    def closure():
        optimizer.zero_grad()
        rows, total = sum(len(labels) for _, labels in batches), 0.0
        for inputs, labels in batches:
            loss = nn.functional.cross_entropy(model(inputs), labels, reduction="sum") / rows
            loss.backward()
            total += loss.detach()
        return total

    return closure


def around_sgd(model: nn.Module, **options) -> SharpnessAware:
    return SharpnessAware(torch.optim.SGD(model.named_parameters(), lr=LR), RHO, "asam", **options)


def same(one: nn.Module, other: nn.Module, **tolerance) -> None:
    assert_close(dict(one.state_dict()), dict(other.state_dict()), **tolerance)


@pytest.mark.parametrize("hold", [False, True])
def test_batch_norms_statistics_are_updated_twice_or_once(hold):
    ours, plain = network(norm=True), network(norm=True)
    optimizer = around_sgd(ours, hold_statistics_of=ours if hold else None)
    for _ in range(3):
        optimizer.step(closure_of(ours, optimizer, [data()]))
        plain_step(plain, [data()], hold=hold)
    same(ours, plain)
    assert ours[1].num_batches_tracked == (3 if hold else 6)


def test_statistics_are_held_also_where_the_second_pass_fails():
    model, calls = network(norm=True), []
    optimizer = around_sgd(model, hold_statistics_of=model)
    run = closure_of(model, optimizer, [data()])

    def closure():
        calls.append(run())
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return calls[-1]

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert model[1].num_batches_tracked == 1


def test_accumulated_micro_batches_are_one_batch():
    inputs, labels = data()
    parts = list(zip(inputs.split(3), labels.split(3), strict=True))
    ours, plain, whole = network(), network(), network()
    optimizer = around_sgd(ours)
    optimizer.step(closure_of(ours, optimizer, parts))
    plain_step(plain, parts)
    plain_step(whole, [(inputs, labels)])
    same(ours, plain)
    same(ours, whole, rtol=1e-9, atol=1e-12)


def test_a_compiled_model_takes_the_same_step():
    ours, plain = network(), network()
    compiled = torch.compile(ours, backend="aot_eager")
    optimizer = around_sgd(ours)
    for _ in range(2):
        optimizer.step(closure_of(compiled, optimizer, [data()]))
        plain_step(plain, [data()])
    same(ours, plain, rtol=1e-9, atol=1e-12)


def test_a_grad_scaler_is_refused():
    """By torch, where it is given the closure, and by us, where it is not."""
    model = network().float()
    optimizer, scaler = around_sgd(model), torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 4)).sum()).backward()
    with pytest.raises(ValueError, match="step needs a closure"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: torch.zeros(()))


def _half(rank: int, meeting: str, answers: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        inputs, labels = data()
        model = DistributedDataParallel(network())
        optimizer = around_sgd(model)
        mine = [(inputs[rank::2], labels[rank::2])]
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer, mine))
        torch.save(model.module.state_dict(), f"{answers}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own, of its processes
def test_two_processes_with_half_a_batch_each_step_as_one_with_all_of_it(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])  # imported once for both
    mp.start_processes(_half, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2, start_method="forkserver")
    plain = network()
    for _ in range(3):
        plain_step(plain, [data()])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_close(found, dict(plain.state_dict()), rtol=1e-9, atol=1e-12)
