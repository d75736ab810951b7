import torch

from detr_exp.model.layer.memory import Memory


def padding():
    """Two canvases of 40 x 64 pixels; the image on the second has 24 x 48."""
    mask = torch.zeros(2, 40, 64, dtype=torch.bool)
    mask[1, 24:], mask[1, :, 48:] = True, True
    return mask


def maps():
    return [torch.arange(2 * 3 * h * w).view(2, 3, h, w).float() for h, w in ((5, 8), (3, 4))]


def test_cells_are_rows_of_all_levels():
    memory = Memory.of(maps(), None)
    assert memory.shapes == [(5, 8), (3, 4)]
    assert memory.padded_cells() is None
    assert torch.equal(memory.cells[1, 2 * 8 + 3], maps()[0][1, :, 2, 3])
    assert torch.equal(memory.cells[1, 40 + 1 * 4 + 2], maps()[1][1, :, 1, 2])


def test_proposals_stand_on_the_centres_of_cells():
    boxes, valid = Memory.of(maps(), None).proposals()
    assert boxes.shape == (1, 52, 4)
    torch.testing.assert_close(boxes[0, 2 * 8 + 3], torch.tensor([3.5 / 8, 2.5 / 5, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, 40 + 1 * 4 + 2], torch.tensor([2.5 / 4, 1.5 / 3, 0.1, 0.1]))
    assert valid.all()


def test_proposals_too_close_to_the_border_are_invalid():
    _, valid = Memory.of([torch.zeros(1, 1, 3, 60)], None).proposals()
    assert valid.view(3, 60).sum(0).tolist() == [0, *[3] * 58, 0]


def test_padding_is_measured_in_cells():
    memory = Memory.of(maps(), padding())
    boxes, valid = memory.proposals()
    padded = memory.padded_cells()
    assert not padded[0].any()
    expected = torch.ones(5, 8, dtype=torch.bool)
    expected[:3, :6] = False
    assert torch.equal(padded[1, :40].view(5, 8), expected)
    assert not (valid & padded).any()
    torch.testing.assert_close(boxes[1, 2 * 8 + 3], torch.tensor([3.5 / 6, 2.5 / 3, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, 2 * 8 + 3], torch.tensor([3.5 / 8, 2.5 / 5, 0.05, 0.05]))


def test_boxes_of_the_image_on_the_canvas():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]], [[0.5, 0.5, 1.0, 1.0]]])
    placed = Memory.of(maps(), padding()).on_canvas(boxes)
    torch.testing.assert_close(placed, torch.tensor([[[0.5, 0.5, 1, 1]], [[0.375, 0.3, 0.75, 0.6]]]))
    assert Memory.of(maps(), None).on_canvas(boxes) is boxes
