import torch

from detr_exp.model.layer.memory import Memory, padding_of


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


def test_cells_without_a_pixel_of_the_image_are_padded():
    memory = Memory.of(maps(), padding())
    boxes, valid = memory.proposals()
    padded = memory.padded_cells()
    assert not padded[0].any()
    expected = torch.ones(5, 8, dtype=torch.bool)
    expected[:3, :6] = False
    assert torch.equal(padded[1, :40].view(5, 8), expected)
    assert torch.equal(padded[1, 40:].view(3, 4), expected[::2, ::2])
    assert not (valid & padded).any()
    assert torch.equal(boxes, Memory.of(maps(), None).proposals()[0])


def test_every_image_has_a_cell_on_every_level():
    mask = torch.ones(1, 96, 160, dtype=torch.bool)
    mask[:, :1, :1] = False
    for level in padding_of(mask, [(12, 20), (6, 10), (3, 5), (2, 3)]):
        assert (~level).sum() == 1
        assert not level[0, 0, 0]
