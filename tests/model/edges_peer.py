"""Comparing networks that predict edges of boxes, and their training, with those of libreyolo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detr_exp.structures import Outputs, Targets, mapped

CLOSE = {"rtol": 0, "atol": 1e-6}
NAMES = {"logits": "pred_logits", "boxes": "pred_boxes", "edges": "pred_corners", "reference": "ref_points"}


def images(side: int, count: int = 1) -> Tensor:
    """Square ones, in float64."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)).double()


def normal(network: Any, pixels: Tensor) -> Tensor:
    """As the peer wants them, which leaves mean and deviation to whoever calls it."""
    return (pixels - network.pixel_mean) / network.pixel_std


def given(targets: Targets) -> list[dict[str, Tensor]]:
    """Objects as the peer wants them."""
    per_image = zip(targets.labels.split(targets.counts), targets.boxes.double().split(targets.counts))
    objects = [{"labels": labels, "boxes": boxes} for labels, boxes in per_image]
    if targets.masks is not None:
        for one, masks in zip(objects, targets.masks.split(targets.counts)):
            one["masks"] = masks
    return objects


def compare_outputs(outputs: Outputs, expected: dict[str, Any]) -> None:
    """All that is predicted in training, of matched and of denoising queries."""

    def compare(found: Any, other: dict[str, Tensor]) -> None:
        for field in {name for name in found._fields if NAMES.get(name) in other}:
            tensor = getattr(found, field)
            tensor = tensor.flatten(-2) if field == "edges" else tensor
            torch.testing.assert_close(tensor, other[NAMES[field]], **CLOSE)
        if "pred_masks" in other:
            for ours, theirs in zip(found.masks, ("spatial_features", "query_features", "bias"), strict=True):
                torch.testing.assert_close(ours, other["pred_masks"][theirs], **CLOSE)

    assert outputs.denoising is not None
    for index, other in enumerate([*expected["aux_outputs"], expected]):
        compare(mapped(outputs.layers, lambda tensor, index=index: tensor[index]), other)
    for index, other in enumerate(expected["dn_outputs"]):
        compare(mapped(outputs.denoising.layers, lambda tensor, index=index: tensor[index]), other)
    compare(outputs.initial, expected["pre_outputs"])
    compare(outputs.denoising.initial, expected["dn_pre_outputs"])
    compare(outputs.encoder, expected["enc_aux_outputs"][0])


def compare_losses(terms: dict[str, Tensor], wanted: dict[str, Tensor]) -> set[str]:
    """All terms of the loss; returns their names."""
    wanted = {name.replace("loss_mal", "loss_class").replace("_enc_0", "_enc"): t for name, t in wanted.items()}
    found = {name: term for name, term in terms.items() if name.startswith("loss_")}
    assert found.keys() - {"loss_ddf"} == wanted.keys() - {"loss_ddf"}, "the last layer teaches itself nothing"
    for name, term in wanted.items():
        torch.testing.assert_close(
            found[name], term, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    return set(wanted)


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    """A state dict with gradients in place of the parameters that have some."""
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {name: gradients.get(name, tensor) for name, tensor in network.state_dict().items()}


def compare_gradients(gradients: dict[str, Tensor], theirs: nn.Module, share: float = 1e-6) -> None:
    """All that the peer has, in its names, up to a share of the largest one of each parameter."""
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            largest = max(1.0, parameter.grad.abs().max().item())
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-6, atol=share * largest, msg=lambda t, n=name: f"{n}: {t}"
            )
    assert len(gradients) > 200
