import pytest
import torch

from detr_exp.ops.canvas import canvas_sizes, content_size, contents_of, padding_mask

SIZES = [(480, 640), (640, 480), (1, 5000), (5000, 1), (97, 97), (33, 1021), (1080, 1920), (7, 3)]
CANVASES = [(160, 160), (128, 224), (640, 480)]


@pytest.mark.parametrize("canvas", CANVASES)
def test_proportions_are_kept_to_the_pixel_and_one_side_is_filled(canvas):
    for size in SIZES:
        content = content_size(size, canvas)
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        assert all(1 <= side <= most for side, most in zip(content, canvas))
        assert any(side == most for side, most in zip(content, canvas))
        for side, original in zip(content, size):
            assert abs(side - original * scale) <= 0.5 or side == 1


def test_tensors_and_integers_give_the_same_sizes():
    heights, widths = torch.tensor(SIZES).T
    for canvas in CANVASES:
        together = torch.stack(content_size((heights, widths), canvas), dim=1)
        assert together.tolist() == [list(content_size(size, canvas)) for size in SIZES]


def test_a_mask_tells_the_size_of_the_image():
    contents = torch.tensor([[96, 128], [1, 128], [96, 5], [40, 70]])
    mask = padding_mask(contents, (96, 128))
    assert mask.shape == (4, 96, 128)
    assert torch.equal(contents_of(mask), contents)
    assert (~mask).sum((1, 2)).tolist() == (contents.prod(1)).tolist()
    assert not mask[0].any()


def test_a_canvas_in_original_pixels():
    sizes, contents = torch.tensor([[480, 640], [300, 100]]), torch.tensor([[120, 160], [160, 53]])
    whole = canvas_sizes(sizes, contents, (160, 160))
    torch.testing.assert_close(whole, torch.tensor([[640.0, 640.0], [300.0, 100 * 160 / 53]]))
