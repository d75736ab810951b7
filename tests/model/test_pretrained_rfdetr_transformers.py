"""RF-DETR as transformers writes it: the same file, the same numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rfdetr_peer import _fill_zeros, peer, settings_of
from transformers import RfDetrConfig
from transformers.models.rf_detr import modeling_rf_detr

from detr_exp.model.head.mask import MaskHead
from detr_exp.model.pretrained import load_weights
from detr_exp.model.rfdetr import RFDETR

SMALL = dict(num_queries=20, group_detr=2)


@pytest.mark.parametrize("kind", ["ObjectDetection", "InstanceSegmentation"])
def test_a_saved_model_gives_the_same_numbers(kind: str, tmp_path: Path) -> None:
    has_masks = kind == "InstanceSegmentation"
    settings: dict[str, Any] = {"device": "cpu", "num_classes": 4, "num_select": 20, "resolution": 112, **SMALL}
    _, config, _ = peer("Base", **settings)
    ours = RFDETR(**settings_of(config), mask_head=partial(MaskHead, downsample=4) if has_masks else None)
    torch.manual_seed(0)
    theirs = getattr(modeling_rf_detr, f"RfDetrFor{kind}")(
        RfDetrConfig(num_labels=5, decoder_n_points=2, **SMALL)
    ).eval()
    _fill_zeros(theirs)
    theirs.save_pretrained(tmp_path)
    load_weights(ours, tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 112, 112)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    ours.pixel_mean.copy_(mean)
    ours.pixel_std.copy_(std)
    with torch.no_grad():
        wanted = theirs(pixel_values=(images - mean) / std, pixel_mask=torch.ones(2, 112, 112, dtype=torch.long))
        found = ours.eval()(images).pred
    torch.testing.assert_close(found.logits, wanted.logits, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found.boxes, wanted.pred_boxes, atol=2e-4, rtol=1e-3)
    if has_masks:
        torch.testing.assert_close(found.masks.dense(), wanted.pred_masks, atol=2e-3, rtol=1e-2)
