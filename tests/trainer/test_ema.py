"""The average of the weights against its closed form, and the exchange of storage."""

import copy
import math

import pytest
import torch
from torch import nn

from detr_exp.trainer.ema import EMA


def make_network(value: float = 0.0) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    set_weights(network, value)
    return network


def set_weights(network: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in [*network.parameters(), network[1].running_mean]:
            tensor.fill_(value)


def test_follows_the_closed_form():
    network = make_network(0.0)
    ema = EMA(network, decay=0.9999, tau=2000)
    expected = 0.0
    for u in range(1, 30):
        set_weights(network, float(u))
        network[1].num_batches_tracked += 1
        ema.update()
        decay = 0.9999 * (1 - math.exp(-u / 2000))
        expected = decay * expected + (1 - decay) * u
    with ema.swapped(network):
        for tensor in [*network.parameters(), network[1].running_mean]:
            torch.testing.assert_close(tensor.detach(), torch.full_like(tensor, expected), rtol=1e-6, atol=0)
        assert network[1].num_batches_tracked == 29
    assert ema.decay_at(1) == pytest.approx(0.0005, rel=1e-3)


def test_rf_detr_copies_first_and_then_uses_the_second_decay():
    network = make_network(1.0)
    ema = EMA(network, decay=0.993, tau=100, copy_first=True)
    set_weights(network, 2.0)
    ema.update()
    assert ema.average[0].unique().item() == 2.0
    set_weights(network, 3.0)
    ema.update()
    decay = 0.993 * (1 - math.exp(-2 / 100))
    assert decay == pytest.approx(0.0197, abs=5e-5)
    assert ema.average[0].unique().item() == pytest.approx(2 * decay + 3 * (1 - decay))
    assert ema.decay_at(1000) == pytest.approx(0.99295, abs=5e-6)


def test_tau_zero_is_a_constant_decay_equal_to_torchs_average():
    network = make_network()
    ema = EMA(network, decay=0.9, tau=0)
    oracle = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    oracle.update_parameters(network)  # its first update copies
    for value in (1.0, -2.0, 5.0):
        set_weights(network, value)
        ema.update()
        oracle.update_parameters(network)
    for name, expected in oracle.module.named_parameters():
        torch.testing.assert_close(ema.average[ema.names.index(name)], expected.detach())


def test_update_interval_leaves_calls_out():
    network = make_network(0.0)
    ema = EMA(network, decay=0.5, tau=0, update_interval=3)
    set_weights(network, 1.0)
    seen = []
    for _ in range(6):
        ema.update()
        seen.append(ema.average[0].unique().item())
    assert seen == [0.0, 0.0, 0.5, 0.5, 0.5, 0.75]
    assert ema.updates == 2


def test_a_skipped_step_changes_nothing_even_when_batch_statistics_are_nan():
    network = make_network(1.0)
    ema = EMA(network, decay=0.5, tau=0)
    before = [tensor.clone() for tensor in ema.average]
    network[1].running_mean.fill_(float("nan"))
    ema.update(torch.tensor(1.0))
    ema._update_where(torch.tensor(False), 0.5)  # as on a device that is not waited for
    assert all(torch.equal(a, b) for a, b in zip(ema.average, before))


def test_an_applied_step_is_the_same_on_both_paths():
    torch.manual_seed(0)
    network = make_network()
    direct, guarded = EMA(network, decay=0.9, tau=5), EMA(network, decay=0.9, tau=5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    direct.update(torch.tensor(0.0))
    guarded._update_where(torch.tensor(True), 1 - guarded.decay_at(1))
    for a, b in zip(direct.average, guarded.average):
        torch.testing.assert_close(a, b)


def test_swapping_gives_back_weights_and_average_after_an_error():
    network = make_network(0.0)
    network.add_module("tied", network[0])  # a module known under two names is exchanged once
    ema = EMA(network, decay=0.5, tau=0)
    set_weights(network, 1.0)
    ema.update()

    def evaluation_that_dies() -> None:
        with ema.swapped(network):
            assert network[0].weight.unique().item() == 0.5
            raise KeyError

    with pytest.raises(KeyError):
        evaluation_that_dies()
    assert network[0].weight.unique().item() == 1.0
    assert ema.average[0].unique().item() == 0.5


def test_frozen_parameters_are_not_averaged():
    network = make_network()
    network[0].requires_grad_(False)
    assert EMA(network, decay=0.5, tau=0).names == ["1.weight", "1.bias", "1.running_mean", "1.running_var"]


def test_a_restored_average_continues_like_the_original():
    torch.manual_seed(0)
    network = make_network()
    first = EMA(network, decay=0.99, tau=10, update_interval=2)
    for value in (1.0, 2.0, 3.0):
        set_weights(network, value)
        first.update()
    saved = copy.deepcopy(first.state_dict())
    second = EMA(network, decay=0.99, tau=10, update_interval=2)
    second.load_state_dict(saved)
    for ema in (first, second):
        for _ in range(3):
            ema.update()
    assert all(torch.equal(a, b) for a, b in zip(first.average, second.average))
    assert (first.updates, first.calls) == (second.updates, second.calls) == (3, 6)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"trainer\.ema_decay is 1\.0"):
        EMA(make_network(), decay=1.0, tau=0)
    without_bias = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    ema = EMA(make_network(), decay=0.5, tau=0)
    with pytest.raises(ValueError, match=r"differ in 1 tensors \(0\.bias\)"):
        ema.load_state_dict(EMA(without_bias, decay=0.5, tau=0).state_dict())
