"""The published recipe gives every parameter the learning rate and weight decay that the `rfdetr` package gives it."""

import importlib.util
from types import SimpleNamespace

import pytest
import rfdetr
import torch
from omegaconf import OmegaConf
from rfdetr_peer import peer, settings_of

from detr_exp.config.compose import compose
from detr_exp.model.pretrained_rfdetr import _joined, _renamed
from detr_exp.model.rfdetr import RFDETR
from detr_exp.optim.param_groups import parameter_groups

SMALL = dict(num_classes=2, group_detr=2, num_queries=5, num_select=5)


def their_groups(network, config, train_config):
    """`get_param_dict` of the package, from its file: the folder it is in wants Lightning."""
    place = f"{rfdetr.__path__[0]}/training/param_groups.py"
    spec = importlib.util.spec_from_file_location("rfdetr_param_groups", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_param_dict(SimpleNamespace(**vars(config) | vars(train_config)), network)


@pytest.mark.parametrize(
    ("experiment", "kind", "size", "groups"),
    [("rfdetr_nano_coco", "Nano", 64, 28), ("rfdetr_base_coco", "Base", 112, 26)],
)
def test_learning_rates_and_weight_decays(experiment, kind, size, groups):
    theirs, config, train_config = peer(kind, resolution=size, **SMALL)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    values = {}
    for group in their_groups(theirs, config, train_config):
        decay = group.get("weight_decay", train_config.weight_decay)
        parameters = group["params"] if isinstance(group["params"], list) else [group["params"]]
        values |= {names[id(one)]: torch.tensor([[group["lr"], decay]]) for one in parameters}
    expected = {name: rows.reshape(-1, 2) for name, rows in _joined(_renamed(values)).items()}
    assert all((rows == rows[0]).all() for rows in expected.values())

    with torch.device("meta"):
        ours = RFDETR(**settings_of(config))
    optim = OmegaConf.to_container(compose([f"experiment={experiment}", "data.root=x"]).optim)
    keys = ("lr", "lr_backbone", "weight_decay")
    actual = parameter_groups(ours, optim["param_groups"], **{key: optim[key] for key in keys})
    assert len(actual) == groups
    ours_by_id = {id(parameter): name for name, parameter in ours.named_parameters()}
    compared = 0
    for group in actual:
        for parameter in group["params"]:
            name = ours_by_id[id(parameter)].replace("class_position", "position")
            right = expected[name][0].tolist()
            assert [group["lr"], group["weight_decay"]] == pytest.approx(right, rel=1e-5), name
            compared += 1
    assert compared == len(ours_by_id)
