"""RT-DETRv2 against transformers: random weights, float64, square images; equal inputs, equal outputs."""

from __future__ import annotations

import pytest
import torch
from rtdetr_peer import SMALL, labels_of, peer_of

from detr_exp.build import compose, criterion

LARGE = ["model.num_layers=6", "model.neck.expansion=1.0"]
PUBLISHED = {
    "r18": [],
    "r34": ["model/backbone=r34vd", "model.num_layers=4"],
    "r18_discrete": ["model.cross_attn_method=discrete"],
    "r18_sp1": ["model.num_points=[1,1,1]"],
    "r50": ["model/backbone=r50vd", *LARGE],
    "r50_m": ["model/backbone=r50vd", "model.num_layers=6", "model.eval_idx=2"],
    "r101": ["model/backbone=r101vd", *LARGE, "model.neck.hidden_dim=384", "model.neck.dim_feedforward=2048"],
}
FAST = ("r18", "r34", "r18_discrete")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_outputs_of_published_networks(name, make, randomise):
    overrides = ["model=rtdetrv2", *PUBLISHED[name]]
    ours = randomise(make(*overrides, num_classes=80).double()).eval()
    theirs = peer_of(ours, compose(overrides)).eval()
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        expected, outputs = theirs(pixel_values=images), ours(images)
    torch.testing.assert_close(outputs.pred.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.pred.boxes, expected.pred_boxes, rtol=0, atol=1e-6)


VARIANTS = {
    "plain": [],
    "rectangle": ["model.image_size=[96,160]"],
    "four levels": ["model.num_points=[2,2,2,2]", "model.image_size=[128,128]"],
    "two encoder layers": ["model.neck.num_encoder_layers=2", "model.neck.use_encoder_idx=[1,2]"],
    "offset scale": ["model.offset_scale=0.3"],
    "learned queries": ["model.learn_query_content=true"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_of_variants(name, small, randomise):
    overrides = VARIANTS[name]
    ours = randomise(small(*overrides).double()).eval()
    theirs = peer_of(ours, compose([*SMALL, *overrides])).eval()
    if name == "learned queries":  # transformers 5 calls a method of tensors on its embedding
        theirs.model.weight_embedding = torch.nn.Parameter(ours.decoder.tgt_embed.weight.detach())
    images = torch.rand(2, 3, *ours.image_size, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        expected, outputs = theirs(pixel_values=images), ours(images)
    torch.testing.assert_close(outputs.pred.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.pred.boxes, expected.pred_boxes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("look_forward_twice", [False, True])
def test_training_losses_and_gradients(look_forward_twice, small, randomise, targets):
    """transformers does not look forward twice: values agree all the same, gradients only without it."""
    overrides = [f"model.look_forward_twice={str(look_forward_twice).lower()}", "model.image_size=[128,128]"]
    cfg = compose([*SMALL, "data.num_classes=7", *overrides])
    ours = randomise(small(*overrides).double()).train()
    theirs = peer_of(ours, cfg).train()
    images = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(2)).double()

    torch.manual_seed(7)
    expected = theirs(pixel_values=images, labels=labels_of(targets))
    torch.manual_seed(7)
    terms = criterion(cfg)(ours(images, targets), targets, num_boxes=3.0)

    last = cfg.model.num_layers - 1
    for name, value in expected.loss_dict.items():
        name = name.replace("loss_vfl", "loss_class").replace(f"_aux_{last}", "_enc")
        assert terms[name].item() == pytest.approx(value.item(), abs=1e-5), name
    assert len(expected.loss_dict) == len(terms) - 1 == 3 * (2 * cfg.model.num_layers + 1)
    assert terms["total"].item() == pytest.approx(expected.loss.item(), abs=1e-5)

    expected.loss.backward()
    terms["total"].backward()
    gradients = peer_gradients(theirs, ours)
    differences = [name for name, p in ours.named_parameters() if (p.grad - gradients[name]).abs().max() > 1e-5]
    assert bool(differences) == look_forward_twice


def peer_gradients(peer, network) -> dict[str, torch.Tensor]:
    """Gradients of the peer under our names."""
    from detr_exp.model.pretrained_rtdetr import from_huggingface

    return from_huggingface({name: parameter.grad for name, parameter in peer.named_parameters()})


def test_postprocessing(small, randomise):
    from types import SimpleNamespace

    from transformers import RTDetrImageProcessor

    ours = randomise(small().double()).eval()
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(2)).double()
    sizes = torch.tensor([[480, 640], [100, 200]])
    with torch.no_grad():
        outputs = ours(images)
    expected = RTDetrImageProcessor().post_process_object_detection(
        SimpleNamespace(logits=outputs.pred.logits, pred_boxes=outputs.pred.boxes), threshold=0.0, target_sizes=sizes
    )
    for actual, wanted in zip(ours.postprocess(outputs, sizes), expected):
        torch.testing.assert_close(actual.scores, wanted["scores"], rtol=0, atol=1e-12)
        torch.testing.assert_close(actual.boxes, wanted["boxes"], rtol=0, atol=1e-6)
        assert actual.labels.tolist() == wanted["labels"].tolist()


def test_an_exported_folder_loads_in_transformers(tmp_path, small, randomise):
    import json

    from omegaconf import OmegaConf
    from safetensors.torch import save_file
    from transformers import RTDetrV2ForObjectDetection

    from detr_exp.model.pretrained_rtdetr import huggingface_config, to_huggingface

    ours = randomise(small()).eval()
    model = OmegaConf.to_container(compose(SMALL).model, resolve=True)
    save_file(to_huggingface(ours.state_dict(), num_points=[4, 4, 4]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(model, list("abcdefg"))))
    theirs, report = RTDetrV2ForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = theirs.eval()(pixel_values=images)
        outputs = ours(images)
    torch.testing.assert_close(outputs.pred.logits, expected.logits, rtol=0, atol=1e-4)
