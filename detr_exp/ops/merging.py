"""Detections of tiles as those of their image: each object once (non-maximum merging).

Two detections of a class from two tiles are the same object if, within the region that both tiles show, they overlap
with an IoU of at least `SAME`: there both have seen the same pixels. Masks are compared where both have one there, as
boxes of a slender object that lies across may hardly overlap, and those of two that cross may be equal; else boxes.
Detections of one tile are never merged with each other, so that those of an image of one tile stay as they are.

The best detection of an object stays: its score, its keypoints, and the sides of its box that its tile does not cut.
A side that lies on a border of its tile, within the image, is where the object continues; it moves to the farthest side
of the same object in the other tiles, whose masks are then added; the box of an object with masks is then that of all
its parts.

Legend: n detections of an image, by tiles; boxes are xyxy in its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detr_exp.structures import Detections
from detr_exp.tile import Tile

SAME = 0.5
AT_BORDER = 0.01  # of a side of the tile: how close to its border a box is cut by it


class Merging:
    """Collects detections of tiles until those of an image are complete.

    Args:
        most: detections with masks that are kept of an image, since each has the size of the image.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.tiles: list[Tile] = []
        self.found: list[Detections] = []

    def complete(
        self, image_ids: Sequence[int], tiles: Sequence[Tile], detections: Sequence[Detections]
    ) -> tuple[list[int], list[Detections]]:
        """Add those of some tiles, on the host and in the pixels of each; the images that are now complete."""
        done: tuple[list[int], list[Detections]] = [], []
        for number, tile, found in zip(image_ids, tiles, detections):
            self.tiles.append(tile)
            self.found.append(found)
            if len(self.tiles) == tile.total:
                done[0].append(number)
                done[1].append(merged(self.found, self.tiles, self.most))
                self.tiles, self.found = [], []
        return done


def merged(found: Sequence[Detections], tiles: Sequence[Tile], most: int) -> Detections:
    """The detections of an image, best first.

    Args:
        found: of each tile, on the host and in its pixels.
        tiles: all tiles of the image.
        most: see `Merging`.
    """
    if len(found) == 1:
        return found[0]
    starts = [torch.tensor([tile.x, tile.y], dtype=torch.float32) for tile in tiles]
    boxes = torch.cat([one.boxes + start.repeat(2).to(one.boxes) for one, start in zip(found, starts)])
    owner = torch.cat([torch.full((len(one),), place) for place, one in enumerate(found)])
    scores, labels = torch.cat([one.scores for one in found]), torch.cat([one.labels for one in found])
    order = scores.argsort(descending=True, stable=True)
    masks = [mask for one in found if one.masks is not None for mask in one.masks.numpy()]
    ordered = [masks[place] for place in order.tolist()] if masks else masks
    groups = _groups(boxes[order].double().numpy(), labels[order].numpy(), owner[order].numpy(), tiles, ordered)
    kept, sides, parts = [], [], []
    for group in groups:
        members = order[group]
        box, continues = _joined(boxes[members], tiles[int(owner[members[0]])], whole=bool(masks))
        kept.append(members[0])
        sides.append(box)
        parts.append(members if continues else members[:1])
    if found[0].masks is not None:
        kept, sides, parts = kept[:most], sides[:most], parts[:most]
    index = torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64)
    made = Detections(scores[index], labels[index], torch.stack(sides) if sides else boxes[:0])
    points = [(one.keypoints, start) for one, start in zip(found, starts) if one.keypoints is not None]
    if points:
        moved = [torch.cat([one[..., :2] + start.to(one), one[..., 2:]], -1) for one, start in points]
        made.keypoints = torch.cat(moved)[index]
    covariances = [one.keypoint_covariance for one in found if one.keypoint_covariance is not None]
    if covariances:
        made.keypoint_covariance = torch.cat(covariances)[index]
    if found[0].masks is not None:
        made.masks = _masks(found, tiles, parts)
    return made


def _groups(
    boxes: np.ndarray,
    labels: np.ndarray,
    owner: np.ndarray,
    tiles: Sequence[Tile],
    masks: Sequence[np.ndarray],
) -> list[list[int]]:
    """For each object its detections that count, the best first: at most one of each tile.

    Args:
        boxes, labels, owner, masks: of detections, best first; each mask is of its tile, and there may be none.
    """
    ends = np.array([(tile.x, tile.y, tile.x + tile.size[1], tile.y + tile.size[0]) for tile in tiles], float)
    taken = np.zeros(len(boxes), bool)
    groups = []
    for first in range(len(boxes)):
        if taken[first]:
            continue
        taken[first], members, place = True, [first], 0
        while place < len(members):
            own = members[place]
            place += 1
            others = np.flatnonzero(~taken & (labels == labels[own]) & (owner != owner[first]))
            overlap = _overlap(boxes[own], ends[owner[own]], boxes[others], ends[owner[others]])
            for i in np.flatnonzero(overlap > 0).tolist() if masks else ():
                two = (own, int(others[i]))
                pair = [(tiles[int(owner[one])], boxes[one], masks[one]) for one in two]
                overlap[i] = _mask_overlap(pair, float(overlap[i]))
            same = others[overlap >= SAME]
            taken[same] = True
            known = {owner[member] for member in members}
            for other in same.tolist():
                if owner[other] not in known:
                    known.add(owner[other])
                    members.append(other)
        groups.append(members)
    return groups


def _overlap(box: np.ndarray, tile: np.ndarray, boxes: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """`[m]` IoU of a box with others, in the regions that its tile and theirs both show; 0 where a box has no part."""
    low, high = np.maximum(tile[:2], tiles[:, :2]), np.minimum(tile[2:], tiles[:, 2:])
    one, other = (
        np.concatenate([np.maximum(part[..., :2], low), np.minimum(part[..., 2:], high)], -1) for part in (box, boxes)
    )
    shared = (np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])).clip(0).prod(1)
    first, second = ((part[:, 2:] - part[:, :2]).clip(0).prod(1) for part in (one, other))
    return shared / np.maximum(first + second - shared, 1e-9)


def _mask_overlap(pair: Sequence[tuple[Tile, np.ndarray, np.ndarray]], otherwise: float) -> float:
    """IoU of two masks within their boxes, in the region that their tiles both show.

    Args:
        pair: of two detections each the tile, the box in the image, and the mask in the tile.
        otherwise: what is returned where one of them has no pixel there.
    """
    low = np.max([(tile.x, tile.y) for tile, _, _ in pair], 0)
    high = np.min([(tile.x + tile.size[1], tile.y + tile.size[0]) for tile, _, _ in pair], 0)
    sides = np.array([box for _, box, _ in pair])
    low = np.maximum(low, np.floor(sides[:, :2].min(0)).astype(int))
    high = np.minimum(high, np.ceil(sides[:, 2:].max(0)).astype(int))
    one, other = (mask[low[1] - t.y : high[1] - t.y, low[0] - t.x : high[0] - t.x] for t, _, mask in pair)
    if not one.any() or not other.any():
        return otherwise
    return float((one & other).sum() / (one | other).sum())


def _joined(boxes: Tensor, tile: Tile, *, whole: bool) -> tuple[Tensor, bool]:
    """The box of an object from those of its detections, and whether it continues in other tiles.

    Args:
        boxes: `[m, 4]`, the best first.
        tile: of the best one.
        whole: where the object continues, the box holds all of them; False: the best one and the sides that are cut.
    """
    box = boxes[0].clone()
    height, width = tile.whole
    borders = (tile.x, tile.y, tile.x + tile.size[1], tile.y + tile.size[0])
    cut = [
        border not in outer and abs(float(side) - border) <= max(1.0, AT_BORDER * length)
        for side, border, outer, length in zip(
            box, borders, ((0,), (0,), (width,), (height,)), (tile.size[1], tile.size[0]) * 2
        )
    ]
    for place, is_cut in enumerate(cut):
        if is_cut or (whole and any(cut)):
            box[place] = boxes[:, place].min() if place < 2 else boxes[:, place].max()
    return box, any(cut)


def _masks(found: Sequence[Detections], tiles: Sequence[Tile], parts: Sequence[Tensor]) -> Tensor:
    """`[m, H, W]` bool: the masks of the parts of each object, in the image."""
    places = [(place, row) for place, one in enumerate(found) for row in range(len(one))]
    made = torch.zeros(len(parts), *tiles[0].whole, dtype=torch.bool)
    for canvas, members in zip(made, parts):
        for place, row in (places[member] for member in members.tolist()):
            tile, masks = tiles[place], found[place].masks
            assert masks is not None
            canvas[tile.y : tile.y + tile.size[0], tile.x : tile.x + tile.size[1]] |= masks[row]
    return made
