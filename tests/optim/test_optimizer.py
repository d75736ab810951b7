"""Every optimiser of torch that a detector can be trained with, by its option and its own keys."""

import copy

import pytest
import torch
from torch import nn

from detr_exp import build
from detr_exp.config.compose import CONF_DIR
from detr_exp.config.mistakes import ConfigError
from detr_exp.optim.optimizer import OPTIMIZERS, UNFIT

OPTIONS = sorted(path.stem for path in (CONF_DIR / "optim").glob("*.yaml"))


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))

    def class_tensors(self):
        return {}


def made(*words, network=None):
    cfg = build.compose(["optim.param_groups.norm=null", *words])
    return build.optimizer(cfg)(network or Small())


def step(network, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    network(torch.rand(2, 3, 2, 2)).square().sum().backward()
    optimizer.step()


def test_every_optimiser_of_torch_has_an_option_or_a_reason():
    there = {n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type)} - {"Optimizer"}
    assert there <= {*OPTIMIZERS, *UNFIT}
    assert {*OPTIONS} == {name.lower() for name in OPTIMIZERS} | {"muon"}


@pytest.mark.parametrize("option", OPTIONS)
def test_it_moves_every_parameter_and_goes_on_from_its_state_exactly(option):
    torch.manual_seed(0)
    network = Small()
    before = copy.deepcopy(network.state_dict())
    optimizer = made(f"optim={option}", network=network)
    step(network, optimizer, 1)
    step(network, optimizer, 2)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    other = copy.deepcopy(network)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = made(f"optim={option}", network=other)
    resumed.load_state_dict(saved)
    step(network, optimizer, 3)
    step(other, resumed, 3)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("option", OPTIONS)
def test_all_its_own_keys_can_be_given(option):
    named = {"momentum": 0.5, "dampening": 0.25, "alpha": 0.5, "rho": 0.5, "lr_decay": 0.5, "beta2_decay": -0.5}
    optimizer = made(f"optim={option}")
    own = [key for key in named if any(key in group for group in optimizer.param_groups)]
    changed = made(f"optim={option}", *(f"++optim.optimizer.{key}={named[key]}" for key in own))
    for key in own:
        assert {group[key] for group in changed.param_groups if key in group} == {named[key]}


def test_a_key_that_has_no_line_in_the_option_can_be_added():
    assert made("optim=adamw", "+optim.optimizer.eps=1e-6").param_groups[0]["eps"] == 1e-6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optim.optimizer._target_=torch.optim.SGD"],
            r"betas is set, but SGD has no such argument .*~optim\.opt",
        ),
        (["+optim.optimizer.momentum=0.9"], r"momentum is set, but AdamW has no such argument"),
        (["+optim.optimizer.lr=1"], r"overridden by optim\.lr"),
        (["optim=sgd", "+optim.optimizer.weight_decay=1"], r"overridden by optim\.weight_decay"),
        (["optim=sgd", "optim.optimizer.momentum=-1"], r"SGD refuses optim\.optimizer\.momentum=-1.*optim=sgd"),
        (["optim=adafactor", "optim.optimizer.eps=[1,2,3]"], r"Adafactor refuses"),
        (["optim.betas=[0.9]"], r"AdamW refuses optim\.optimizer\.betas=\[0\.9\]"),
        (["optim=muon", "optim.optimizer.adjust_lr_fn=none"], r"Muon refuses"),
        (["optim=rprop", "optim.weight_decay=0.1"], r"Rprop has no weight decay: optim\.weight_decay=0"),
        (["optim.optimizer._target_=torch.optim.LBFGS"], r"LBFGS evaluates the loss several times"),
        (["optim.optimizer._target_=torch.optim.SparseAdam"], r"sparse gradients"),
        (["optim.optimizer._target_=torch.optim.Muon"], r"optim=muon uses AdamW"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_starts(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        build.optimizer(build.compose(words))
    assert "allow_targets=[torch]" not in str(caught.value)


def test_a_key_of_a_users_own_option_that_nothing_reads_is_refused(tmp_path, tiny_run):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").write_text("defaults: [adamw, _self_]\nlr_head: 1.0e-3\n")
    cfg = build.compose([*tiny_run, "optim=mine"], config_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"optim\.lr_head, which nothing reads; it takes lr, .*~optim\.lr_head"):
        build.run(cfg, tmp_path / "run")


@pytest.mark.parametrize(("line", "is_read"), [("weight_box: 5.0", False), ("sharpness: 2.0", True)])
def test_a_key_of_a_users_own_loss_is_read_by_it_or_refused(tmp_path, tiny_run, line, is_read):
    (tmp_path / "loss").mkdir()
    text = f"""\
defaults: [terms: detr, _self_]
activation: sigmoid
{line}
class_loss:
  _target_: detr_exp.loss.classification.focal
  _partial_: true
  alpha: 0.25
  gamma: {"${loss.sharpness}" if is_read else 2.0}
  label_smoothing: 0.0
"""
    (tmp_path / "loss" / "mine.yaml").write_text(text)
    cfg = build.compose([*tiny_run, "loss=mine"], config_dir=tmp_path)
    if is_read:
        assert (
            build.run(cfg, tmp_path / "run").criterion.terms["class"].function.keywords["loss"].keywords["gamma"] == 2.0
        )
    else:
        with pytest.raises(ConfigError, match=r"loss\.weight_box, which nothing reads; .*~loss\.weight_box"):
            build.run(cfg, tmp_path / "run")
