"""A network for other programs: tensors in, tensors out, with or without pre- and postprocessing.

Legend: B images, Q queries, C logits, n detections of an image, K keypoints, (h, w) size the network is made for.

| | without | with |
|---|---|---|
| preprocess | `images` `[B, 3, h, w]` float32, RGB in 0..1 | `images` `[B, H, W, 3]` uint8, RGB, of any size |
| postprocess | `logits` `[B, Q, C]`, `boxes` `[B, Q, 4]` cxcywh in 0..1, `masks` `[B, Q, mh, mw]` logits, `keypoints` `[B, Q, C * K, 8]`, or `[B, Q, K, 2]` x, y in 0..1 | `scores` `[B, n]` best first, `labels` `[B, n]`, `boxes` `[B, n, 4]` xyxy in pixels, `masks` `[B, n, mh, mw]` logits, `keypoints` `[B, n, K, 3]` x, y in pixels and confidence, `keypoint_covariance` `[B, n, K, 2, 2]` of networks that predict it |

With postprocess but without preprocess there is a second input, `image_sizes` `[B, 2]` int64: (height, width) of the
original images; likewise without postprocess, for a network whose images keep their proportions (`data.fit=letterbox`),
because it has to know where they end. Such images lie in the top left corner of (h, w), and `boxes` in 0..1, `masks` and
`keypoints` in 0..1 are relative to all of it. Normalisation by mean and standard deviation is always inside.
"""  # noqa: E501 - a table

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.data.fit import STRETCH, Fit
from detr_exp.model.decoder.pose import PoseQuality
from detr_exp.model.head.keypoint import rows, with_keypoints, with_points
from detr_exp.model.layer.deformable_attention import DeformableAttention
from detr_exp.model.postprocess import best_in_pixels, cut
from detr_exp.ops.canvas import canvas_sizes, content_size, padding_mask
from detr_exp.protocols import KeypointScored, Network
from detr_exp.structures import Prediction, predicted


class Graph(nn.Module):
    """The network between named inputs and outputs.

    Args:
        network: in evaluation mode.
        preprocess: the input is images of any size as bytes, which it resizes.
        postprocess: the output is detections, as many as the network has queries.
        fit: of images to the network's input.

    Attributes:
        inputs, outputs: names, in order.
    """

    def __init__(self, network: Network, *, preprocess: bool, postprocess: bool, fit: Fit = STRETCH) -> None:
        super().__init__()
        self.network, self.fit = network, fit
        self.preprocess, self.postprocess = preprocess, postprocess
        masks = [task for task in network.tasks if task == "masks"]
        keypoints = [task for task in network.tasks if task == "keypoints"]
        needs_sizes = (postprocess or fit.pads) and not preprocess
        self.inputs = ["images", "image_sizes"] if needs_sizes else ["images"]
        self.outputs = ["logits", "boxes", *masks, *keypoints]
        if postprocess:
            self.outputs = [
                "scores",
                "labels",
                "boxes",
                *masks,
                *keypoints,
                *(f"{k[:-1]}_covariance" for k in keypoints if isinstance(network, KeypointScored)),
            ]

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """See the table of the module."""
        canvas = self.network.image_size
        if self.preprocess:
            sides = [images.new_full((images.shape[0], 1), side, dtype=torch.int64) for side in images.shape[1:3]]
            image_sizes = torch.cat(sides, dim=1) if self.postprocess or self.fit.pads else None
            images = fitted(images, canvas, self.fit)
        contents = padding = None
        if image_sizes is not None and self.fit.pads:
            contents = torch.stack(content_size((image_sizes[:, 0], image_sizes[:, 1]), canvas), dim=1)
            padding = padding_mask(contents, canvas)
        pred = self.network(images.to(self.network.pixel_mean.dtype), padding_mask=padding).pred
        outputs = _plain(pred)
        if self.postprocess and image_sizes is not None:
            outputs = self._detections(pred, image_sizes, contents)
        return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in outputs)

    def example(self, batch_size: int) -> tuple[Tensor, ...]:
        """Random inputs of the right shapes."""
        height, width = self.network.image_size
        channels, device = len(self.network.pixel_mean), self.network.pixel_mean.device
        if self.preprocess:
            return (
                torch.randint(0, 256, (batch_size, height + 7, width + 3, channels), dtype=torch.uint8, device=device),
            )
        images = torch.rand(batch_size, channels, height, width, device=device)
        sizes = torch.tensor([[height, width]], device=device).repeat(batch_size, 1)
        return (images, sizes) if "image_sizes" in self.inputs else (images,)

    def _detections(self, pred: Prediction, image_sizes: Tensor, contents: Tensor | None) -> tuple[Tensor, ...]:
        network, ends = self.network, image_sizes.flip(1).tile(2)[:, None]
        if contents is not None:
            image_sizes = canvas_sizes(image_sizes, contents, network.image_size)
        best = best_in_pixels(network, pred, image_sizes)
        if contents is not None and network.cuts_boxes:
            best = best._replace(boxes=cut(best.boxes, ends.to(best.boxes)))
        masks, keypoints = predicted(pred, "masks"), predicted(pred, "keypoints")
        if masks is not None:
            return *best[:3], masks._replace(queries=rows(masks.queries, best.queries)).dense()
        if keypoints is None:
            return best[:3]
        if keypoints.shape[-1] == 2:
            return with_points(best, keypoints, network.keypoint_counts, image_sizes)
        alpha = network.score_alpha if isinstance(network, KeypointScored) else 0.0
        parts = with_keypoints(best, keypoints, pred.boxes, network.keypoint_counts, image_sizes, alpha)
        return parts[: len(self.outputs)]  # without covariances where scores do not depend on them


def fitted(images: Tensor, size: tuple[int, int], fit: Fit = STRETCH) -> Tensor:
    """Bytes `[B, H, W, 3]` -> `[B, 3, h, w]` in 0..1: as evaluation shows them, but not rounded to integers.

    Engines differ in the last digits, which rounding could enlarge to 1.
    """
    height, width = fit.content((images.shape[1], images.shape[2]), size)
    planes = images.permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, size=(height, width), mode="bilinear", antialias=True).clamp(0, 255)
    if fit.pads:
        fill = torch.tensor(fit.fill, dtype=planes.dtype, device=planes.device)[:, None, None]
        planes = F.pad(planes - fill, (0, size[1] - width, 0, size[0] - height)) + fill
    return planes / 255


def sample_discretely(network: Network) -> None:
    """Make all that reads maps at points read single cells, in place: for engines without `grid_sample`."""
    for module in network.modules():
        if isinstance(module, (DeformableAttention, PoseQuality)):
            module.method = "discrete"


def _plain(pred: Prediction) -> tuple[Tensor, ...]:
    masks = predicted(pred, "masks")
    parts = (pred.logits, pred.boxes, None if masks is None else masks.dense(), predicted(pred, "keypoints"))
    return tuple(part for part in parts if part is not None)
