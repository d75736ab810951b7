"""The largest member of the trained network as the teacher of the smaller ones."""

from __future__ import annotations

from torch import Tensor

from detr_exp.loss.stacks import without_tasks
from detr_exp.loss.teacher import EdgeGrid
from detr_exp.structures import Outputs, Prediction, mapped
from detr_exp.trainer.hardware import Hardware
from detr_exp.trainer.teaching import Seen


class LargestMember:
    """In-place distillation (Yu et al. 2020, BigNAS, section 3.1): smaller members learn from what it predicts.

    Args:
        threshold: score above which a detection is a target where no object is.
    """

    def __init__(self, *, threshold: float) -> None:
        self.record = {"teacher": "the largest member"}
        self.threshold = threshold
        self.image_size: tuple[int, int] | None = None
        self.classes: list[str] = []
        self.activation = ""  # that of the network
        self.edge_grid: EdgeGrid | None = None
        self.map_channels: list[int] = []
        self.map_strides: list[int] = []
        self.kept: Prediction | None = None

    def keep(self, outputs: Outputs) -> None:
        """Keep what the largest member predicts for a batch, of one group of queries, without gradient."""
        count = outputs.layers.boxes.shape[2] // outputs.groups
        self.kept = mapped(without_tasks(outputs.pred), lambda part: part.detach()[:, :count])

    def place(self, hardware: Hardware) -> None:
        """It is where the network is."""

    def __call__(self, images: Tensor, padding_mask: Tensor | None, *, detects: bool) -> Seen:
        """See `trainer.teaching.Teacher`."""
        return Seen(self.kept, None)
