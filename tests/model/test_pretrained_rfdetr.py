import argparse
import logging
import types
from functools import partial

import pytest
import torch
from rfdetr_peer import backbone, peer, settings_of
from torch.nn import functional as F

from detr_exp import build
from detr_exp.model.adapter.slim import undetermined_by
from detr_exp.model.head.mask import MaskHead
from detr_exp.model.pretrained import load_weights
from detr_exp.model.pretrained_rfdetr import from_rfdetr, rfdetr_state
from detr_exp.model.pretrained_rtdetr import to_official
from detr_exp.model.rfdetr import RFDETR
from detr_exp.model.rfdetr_keypoint import RFDETRKeypoint


@pytest.fixture(scope="module")
def theirs():
    return peer(num_classes=5, group_detr=3, num_queries=20, num_select=20, resolution=192)


@pytest.fixture
def make(theirs):
    """Our network like theirs but for some changes, with weights of its own."""

    def network(**changes):
        generator = torch.Generator().manual_seed(99)
        with torch.device("meta"):  # to be fast
            made = RFDETR(**settings_of(theirs[1]) | changes)
        made.to_empty(device="cpu")
        for tensor in made.state_dict().values():
            tensor.uniform_(generator=generator)
        return made

    return network


def stored(tmp_path, theirs, **more):
    content = {"model": theirs[0].state_dict(), "args": argparse.Namespace(num_queries=20)} | more
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


def scaled(state, factor, prefix=""):
    return {prefix + name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def test_every_tensor_finds_its_place(tmp_path, theirs, make, caplog):
    network = make()
    with caplog.at_level(logging.INFO):
        load_weights(network, stored(tmp_path, theirs))
    dropped = next(m for m in caplog.messages if "ignored: " in m)
    assert dropped.endswith("ignored: _kp_active_mask, backbone.0.encoder.encoder.embeddings.mask_token")
    state = theirs[0].state_dict()
    count = sum(t.numel() for name, t in state.items() if "mask" not in name)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == count
    block = "backbone.0.encoder.encoder.encoder.layer.3.attention.attention."
    qkv = torch.cat([state[f"{block}{part}.weight"] for part in ("query", "key", "value")])
    assert torch.equal(network.backbone.blocks[3].qkv.weight, qkv)
    assert torch.equal(
        network.queries.box_head.layers[1].bias[2], state["transformer.enc_out_bbox_embed.2.layers.1.bias"]
    )
    assert torch.equal(network.queries.content[1, 3], state["query_feat.weight"][23])


def test_every_kind_of_file(theirs):
    state = theirs[0].state_dict()
    wrong = scaled(state, 2.0)
    lightning = scaled(state, 1.0, "model.")
    averaged = {"RFDETREMACallback": {"average_model_state_dict": scaled(state, 1.0, "module.model.")}, "Other": {}}
    contents = {
        "published": {"model": state, "args": types.SimpleNamespace(num_queries=20)},
        "plain": state,
        "training": {"model": state, "state_dict": lightning, "args": {"lr": 1e-4}, "model_name": "RFDETRNano"},
        "old training": {"model": wrong, "ema_model": state, "args": argparse.Namespace()},
        "compiled Lightning": {"state_dict": scaled(state, 1.0, "model._orig_mod."), "epoch": 3, "callbacks": {}},
        "averaged Lightning": {"state_dict": scaled(wrong, 1.0, "model."), "callbacks": averaged},
    }
    for kind, content in contents.items():
        actual = rfdetr_state(content)
        assert actual.keys() == state.keys(), kind
        assert all(torch.equal(actual[name], tensor) for name, tensor in state.items()), kind
    assert rfdetr_state({"model": {"decoder.layers.0.weight": torch.zeros(1)}, "epoch": 1}) is None


def test_what_it_does_not_know_is_refused(tmp_path, theirs, make):
    path = stored(tmp_path, theirs, extra=torch.nn.ReLU())
    with pytest.raises(ValueError, match="was not opened"):
        load_weights(make(), path)


def test_groups_and_queries_are_cut_group_by_group(tmp_path, theirs, make):
    network = make(num_groups=2, num_queries=7)
    load_weights(network, stored(tmp_path, theirs))
    state = theirs[0].state_dict()
    assert torch.equal(network.queries.content, state["query_feat.weight"].view(3, 20, -1)[:2, :7])
    assert torch.equal(network.queries.delta, state["refpoint_embed.weight"].view(3, 20, 4)[:2, :7])
    assert torch.equal(network.queries.project.weight[1], state["transformer.enc_output.1.weight"])


def test_more_groups_and_queries_keep_what_they_started_with(tmp_path, theirs, make):
    network = make(num_groups=4, num_queries=30)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_weights(network, stored(tmp_path, theirs))
    state = theirs[0].state_dict()
    assert torch.equal(network.queries.content[:3, :20], state["query_feat.weight"].view(3, 20, -1))
    assert torch.equal(network.queries.content[:, 20:], before["queries.content"][:, 20:])
    assert torch.equal(network.queries.content[3], before["queries.content"][3])
    assert torch.equal(network.queries.box_head.layers[0].weight[3], before["queries.box_head.layers.0.weight"][3])
    assert torch.equal(
        network.queries.box_head.layers[0].weight[2], state["transformer.enc_out_bbox_embed.2.layers.0.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "rows", "word"),
    [
        (dict(num_classes=6), 6, ""),
        (dict(num_classes=5), 5, "5 of its 6 logits loaded"),
        (dict(num_classes=3), 0, "initialised anew; the file has 6 sigmoid logits, this network 3"),
        (dict(num_classes=90), 0, "initialised anew; the file has 6 sigmoid logits, this network 90"),
        (dict(num_classes=5, activation="softmax"), 0, "initialised anew"),
    ],
)
def test_class_head(tmp_path, theirs, make, caplog, changes, rows, word):
    network = make(**changes)
    before = {name: network.state_dict()[name].clone() for name in network.class_tensors()}
    with caplog.at_level(logging.INFO):
        load_weights(network, stored(tmp_path, theirs))
    about_head = [message for message in caplog.messages if message.startswith("class head")]
    assert len(about_head) == bool(word)
    assert all(word in message for message in about_head)
    state = theirs[0].state_dict()
    if rows:
        assert torch.equal(network.head.classes.weight, state["class_embed.weight"][:rows])
        assert torch.equal(network.queries.class_head.bias[1], state["transformer.enc_out_class_embed.1.bias"][:rows])
    else:
        assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(network.norm.weight, state["transformer.decoder.norm.weight"])


def test_position_embedding_is_resampled(tmp_path, theirs, make):
    network = make(backbone=backbone(theirs[1], position_grid=20).to("meta"))
    load_weights(network, stored(tmp_path, theirs))
    position = theirs[0].state_dict()["backbone.0.encoder.encoder.embeddings.position_embeddings"]
    grid = position[:, 1:].transpose(1, 2).view(1, 384, 12, 12)
    expected = F.interpolate(grid, (20, 20), mode="bicubic", antialias=True)
    assert torch.equal(network.backbone.embedding.position, expected)
    assert torch.equal(network.backbone.embedding.class_position, position[:, :1])


def test_the_twelfth_block_of_base_is_left_out(tmp_path, caplog):
    network, config, _ = peer("Base", num_classes=2, group_detr=2, num_queries=5, num_select=5, resolution=112)
    torch.save({"model": network.state_dict()}, tmp_path / "base.pth")
    with caplog.at_level(logging.INFO):
        load_weights(RFDETR(**settings_of(config)), tmp_path / "base.pth")
    dropped = next(m for m in caplog.messages if "ignored: " in m)
    assert "mask_token" in dropped
    assert "backbone.blocks.11.qkv.weight" in dropped
    assert "backbone.blocks.10" not in dropped


def test_another_architecture_is_named(tmp_path, theirs, make):
    path = stored(tmp_path, theirs)
    with torch.device("meta"):
        small_patches = backbone(theirs[1], patch_size=8, image_size=[96, 96])
    for changes in (
        dict(num_layers=3),
        dict(hidden_dim=128),
        dict(backbone=small_patches),
    ):
        with pytest.raises(ValueError, match="use model=rfdetr, for which the file was made"):
            load_weights(make(**changes), path)
    adapted = {"backbone.0.encoder.base_model.model.weight": torch.zeros(1), "refpoint_embed.weight": torch.zeros(1)}
    torch.save(adapted, path)
    with pytest.raises(ValueError, match="LoRA"):
        load_weights(make(), path)


def test_keypoint_files(caplog):
    """Classes with keypoints come first in a file; other numbers of keypoints are initialised anew."""
    theirs, config, _ = peer(
        *("KeypointPreview", "Keypoint"),
        **dict(num_classes=9, group_detr=2, num_queries=5, num_select=5, resolution=48),
        num_keypoints_per_class=[5, 3],
    )
    state = theirs.state_dict()

    def loaded(file, **changes):
        with torch.device("meta"):
            network = RFDETRKeypoint(**settings_of(config) | dict(score_alpha=0.2) | changes)
        own = {name: torch.full(tensor.shape, 7.0) for name, tensor in network.state_dict().items()}
        network.load_state_dict(own, assign=True)
        with caplog.at_level(logging.INFO):
            return from_rfdetr(file, network)

    same = loaded(state, num_classes=2, keypoint_counts=[5, 3])
    assert torch.equal(same["head.classes.bias"], state["class_embed.bias"][:2])
    assert torch.equal(same["keypoint_position"], state["transformer.decoder.keypoint_pos_embed"])
    assert "2 of its 10 logits loaded" in caplog.text
    other = loaded(state, num_classes=2, keypoint_counts=[4, 0])
    assert (other["head.classes.bias"] == 7).all()
    assert (other["keypoint_queries.tokens"] == 7).all()
    assert torch.equal(other["layers.1.norm3.weight"], state["transformer.decoder.layers.1.kp_norm5.weight"])
    assert "keypoints: initialised anew; the file has 8, this network 4" in caplog.text
    # The oldest files put a class without keypoints first, and have one projector.
    old = {name: tensor for name, tensor in state.items() if "cross_attn_projector" not in name}
    old["_kp_active_mask"] = torch.tensor([[0] * 5, [1] * 5, [1, 1, 1, 0, 0]]).bool()
    actual = loaded(old, num_classes=2, keypoint_counts=[5, 3])
    assert torch.equal(actual["head.classes.bias"], state["class_embed.bias"][1:3])
    assert torch.equal(actual["keypoint_neck.levels.0.norm.bias"], state["backbone.0.projector.stages.0.1.bias"])


def test_a_file_for_another_family_is_refused(tmp_path, theirs, make, tiny_run):
    network = build.network(build.compose([*tiny_run, "data.num_classes=3"]))
    with pytest.raises(ValueError, match="for model=rfdetr, but the network is another; use model=rfdetr, for which"):
        load_weights(network, stored(tmp_path, theirs))
    state = to_official(network.state_dict(), num_points=[4, 4, 4], spatial_shapes=[(1, 1)])
    torch.save({"ema": {"module": state}}, tmp_path / "rtdetr.pth")
    with pytest.raises(
        ValueError, match=r"rtdetr\.pth does not fit .*choose model=rtdetrv2_tiny model/backbone=tiny, or"
    ):
        load_weights(make(), tmp_path / "rtdetr.pth")


def test_a_file_for_another_task_is_refused(tmp_path, theirs, make):
    network = make(mask_head=partial(MaskHead, downsample=4))
    with pytest.raises(ValueError, match="a file for model=rfdetr, but the network is rfdetr_seg; use model=rfdetr,"):
        load_weights(network, stored(tmp_path, theirs))


def test_a_network_that_is_to_be_adapted_keeps_what_a_file_does_not_determine(tmp_path, theirs, make):
    """Its values are marked as not finite meanwhile."""
    network = make(num_classes=3)
    before = network.state_dict()["head.classes.bias"].clone()
    missing, share = undetermined_by(lambda: load_weights(network, stored(tmp_path, theirs), list("abc")), network)
    assert "head.classes.bias" in missing
    assert torch.equal(network.state_dict()["head.classes.bias"], before)
    assert share.endswith(f"new: {len(network.class_tensors())} class tensors for 3 classes")
