"""A plain `transformers` RT-DETRv2 on the images our runs see, for comparison.

Trains their network with their loss, AdamW and one cosine, on batches from our loader, and evaluates with our metric:

    python scripts/reference_transformers.py experiment=demo --minutes 5.5

The overrides choose data, epochs, batch size and image size as for `detr_exp.train`; `--minutes` stops training early
(CPU time of the process). Their network is small (about 3 M parameters) unless `--r18` asks for the published one.
"""

from __future__ import annotations

import argparse
import math
import time
from types import SimpleNamespace

import torch
from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

from detr_exp import build
from detr_exp.model.postprocess import best_in_pixels
from detr_exp.structures import Prediction


def network(num_classes: int, r18: bool) -> RTDetrV2ForObjectDetection:
    if r18:
        backbone = RTDetrResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        width, channels, layers, queries = 256, [128, 256, 512], 3, 300
    else:
        backbone = RTDetrResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        width, channels, layers, queries = 128, [64, 96, 128], 3, 60
    config = RTDetrV2Config(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=channels,
        encoder_hidden_dim=width,
        encoder_ffn_dim=4 * width,
        d_model=width,
        decoder_in_channels=[width] * 3,
        decoder_ffn_dim=4 * width,
        decoder_layers=layers,
        num_queries=queries,
        num_labels=num_classes,
        hidden_expansion=0.5,
    )
    model = RTDetrV2ForObjectDetection(config)
    for module in model.modules():  # their initialisation of norms (close to zero) cannot be trained from scratch
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--minutes", type=float, default=math.inf, help="CPU minutes of training")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r18", action="store_true")
    arguments = parser.parse_args()
    cfg = build.compose(arguments.overrides)
    data = build.data(cfg)
    torch.manual_seed(cfg.seed)
    model = network(data.num_classes, arguments.r18)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=1e-4)
    seen = SimpleNamespace(image_size=tuple(cfg.model.image_size), stride=32, tasks=("boxes",))
    loader = data.loader("train", network=seen, batch_size=cfg.trainer.batch_size, seed=cfg.seed, training=True)
    total = cfg.trainer.epochs * len(loader)
    started, step = time.process_time(), 0
    for epoch in range(cfg.trainer.epochs):
        model.train()
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            spent = (time.process_time() - started) / 60
            share = max(step / total, spent / arguments.minutes)
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * 0.5 * (1 + math.cos(math.pi * share)) * min(1, (step + 1) / 100)
            labels, start = [], 0
            for count in batch.targets.counts:
                part = slice(start, start + count)
                labels.append({"class_labels": batch.targets.labels[part], "boxes": batch.targets.boxes[part]})
                start += count
            loss = model(pixel_values=batch.pixels().contiguous(), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            step += 1
        print(f"epoch {epoch + 1}: loss {loss.item():.2f}, {spent:.2f} CPU min, {step} steps", flush=True)
        if share >= 1:
            break
    model.eval()
    metric = build.metric(cfg, data, seen)("val")
    loader = data.loader("val", network=seen, batch_size=cfg.trainer.batch_size, seed=cfg.seed)
    with torch.inference_mode():
        for batch in loader:
            out = model(pixel_values=batch.pixels().contiguous())
            found = Prediction(out.logits, out.pred_boxes)
            facts = SimpleNamespace(num_queries=out.logits.shape[1], activation="sigmoid", cuts_boxes=False)
            metric.update(batch.image_ids, best_in_pixels(facts, found, batch.image_sizes).detections())
    values = metric.compute()
    print({name: round(values[name], 4) for name in ("mAP", "mAP50", "mAP75")}, f"{step} steps")


if __name__ == "__main__":
    main()
