"""A contender of the proof suite: RT-DETRv2 of `transformers`, trained as its guide to object detection does.

Its Trainer, losses, image processor and Albumentations, from a backbone of timm with the same file of weights as ours.
Two things differ from the guide, which fine-tunes a detector that was trained on COCO. The rates are options, because
most of this network starts at random. And its batch norms start at 1: `RTDetrV2PreTrainedModel` gives them weights
around 0 (normal, 0.01), with which nothing is learned within these budgets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    RTDetrImageProcessor,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    TimmBackboneConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from detr_exp.contest.job import Facts, Job, cpu_seconds, run
from detr_exp.model.backbone.timm_backbone import TimmBackbone
from detr_exp.values import Values

STRIDES = (8, 16, 32)


def contend(job: Job) -> tuple[list[Values], Facts]:
    """Train and predict; `options` has `backbone` (timm's name), `network` and `training`."""
    torch.set_num_threads(1)
    set_seed(job.seed)
    categories = job.content("train")["categories"]
    network, start = make_network(job, len(categories))
    processor = RTDetrImageProcessor(
        size={"height": job.resolution, "width": job.resolution},
        do_normalize=True,
        image_mean=start.pixel_mean,
        image_std=start.pixel_std,
    )
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    arguments = TrainingArguments(
        output_dir=f"{job.folder}/run",
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.batch_size,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_num_workers=0,
        seed=job.seed,
        **job.options["training"],
    )
    trainer = Trainer(
        model=network,
        args=arguments,
        train_dataset=Annotated(job, label_of, processor),
        data_collator=_batch,
    )
    before = cpu_seconds()
    trainer.train()
    spent = cpu_seconds() - before
    parameters = sum(one.numel() for one in network.parameters())
    return _predictions(job, network.eval(), processor, categories), Facts(spent, trainer.state.global_step, parameters)


def make_network(job: Job, num_classes: int) -> tuple[Any, TimmBackbone]:
    """The network, and the backbone whose weights it starts from, which also knows how these expect pixels."""
    name = job.options["backbone"]
    start = TimmBackbone(
        name=name, out_strides=list(STRIDES), freeze_norm=False, pretrained=job.weights or False, options={}
    )
    maps: Values = {"backbone": name, "out_indices": start.body.feature_info.out_indices}
    settings: Values = {"num_labels": num_classes, "encoder_in_channels": start.out_channels, **job.options["network"]}
    network: Any = RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=TimmBackboneConfig(**maps), **settings))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    network.model.backbone.model._backbone.load_state_dict(start.body.state_dict())
    return network, start


class Annotated(torch.utils.data.Dataset[Values]):
    """The training images with the augmentation of the guide."""

    def __init__(self, job: Job, label_of: dict[int, int], processor: Any) -> None:
        self.images, self.label_of, self.processor = job.images("train"), label_of, processor
        self.objects: dict[int, list[Values]] = {}
        for one in job.content("train")["annotations"]:
            self.objects.setdefault(one["image_id"], []).append(one)
        import albumentations  # of the extra

        self.augment = albumentations.Compose(
            [
                albumentations.Perspective(p=0.1),
                albumentations.HorizontalFlip(p=0.5),
                albumentations.RandomBrightnessContrast(p=0.5),
                albumentations.HueSaturationValue(p=0.1),
            ],
            bbox_params=albumentations.BboxParams(format="coco", label_fields=["category"], clip=True, min_area=25),
            seed=job.seed,
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Values:
        image, path = self.images[index]
        objects = self.objects.get(image["id"], [])
        labels = [self.label_of[one["category_id"]] for one in objects]
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        made = self.augment(image=pixels, bboxes=[one["bbox"] for one in objects], category=labels)
        annotations = [
            {
                "image_id": image["id"],
                "category_id": int(label),
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for label, box in zip(made["category"], made["bboxes"])
        ]
        given = {"image_id": image["id"], "annotations": annotations}
        found = self.processor(images=made["image"], annotations=given, return_tensors="pt")
        return {"pixel_values": found["pixel_values"][0], "labels": found["labels"][0]}


def _batch(samples: list[Values]) -> Values:
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": [sample["labels"] for sample in samples]}


@torch.inference_mode()
def _predictions(job: Job, network: Any, processor: Any, categories: list[Values]) -> list[Values]:
    found: list[Values] = []
    for image, path in job.images("held_out"):
        with Image.open(path) as opened:
            pixels = processor(images=opened.convert("RGB"), return_tensors="pt")
        outputs = network(pixel_values=pixels["pixel_values"])
        size = torch.tensor([[image["height"], image["width"]]])
        (best,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size)
        for score, label, (x0, y0, x1, y1) in zip(
            best["scores"].tolist(), best["labels"].tolist(), best["boxes"].tolist()
        ):
            box = [x0, y0, x1 - x0, y1 - y0]
            found.append({"image_id": image["id"], "category_id": categories[label]["id"], "bbox": box, "score": score})
    return found


if __name__ == "__main__":
    run(contend)
