import torch
import torch.nn.functional as F

from detr_exp.ops.points import OVERSAMPLING, UNCERTAIN_SHARE, sample_bilinear, sample_nearest, uncertain_points


def test_bilinear_sampling_reads_a_plane_exactly():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(10.0), indexing="ij")
    plane = (2 * (columns + 0.5) / 10 + 3 * (rows + 0.5) / 6)[None, None]
    points = torch.rand(1, 50, 2) * 0.8 + 0.1
    torch.testing.assert_close(sample_bilinear(plane, points)[0, 0], points[0] @ torch.tensor([2.0, 3.0]))


def test_bilinear_sampling_continues_the_border():
    values = sample_bilinear(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[0.0, 0.5], [1.0, 0.5]]]))
    assert values.flatten().tolist() == [1.0, 2.0]


def test_nearest_sampling_equals_grid_sample_on_the_chosen_masks():
    torch.manual_seed(0)
    masks, index, points = torch.rand(5, 9, 13) > 0.5, torch.tensor([4, 0, 0, 2]), torch.rand(4, 300, 2)
    grid = (2 * points - 1)[:, :, None]
    oracle = F.grid_sample(masks[index, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    sampled = sample_nearest(masks, index, points)
    assert sampled.dtype == torch.bool
    assert torch.equal(sampled.float(), oracle[:, 0, :, 0])


def test_shared_points_are_read_in_every_mask():
    torch.manual_seed(0)
    masks, points = torch.rand(3, 4, 4) > 0.5, torch.rand(1, 20, 2)
    shared = sample_nearest(masks, torch.arange(3), points)
    assert torch.equal(shared, sample_nearest(masks, torch.arange(3), points.expand(3, -1, -1)))


def test_most_points_lie_where_the_mask_is_undecided():
    """A mask that is sure everywhere but on a vertical line."""
    torch.manual_seed(0)
    logits = (torch.arange(32.0) - 15.5).abs().expand(2, 32, 32)
    points = uncertain_points(logits, 64)
    assert points.shape == (2, 64, 2)
    assert points.min() >= 0
    assert points.max() < 1
    distance = (points[..., 0] - 0.5).abs()
    num_uncertain = int(UNCERTAIN_SHARE * 64)
    assert (distance[:, :num_uncertain] < 1.5 * UNCERTAIN_SHARE / OVERSAMPLING / 2).all()
    assert distance[:, num_uncertain:].max() > 0.25


def test_no_masks_give_no_points():
    assert uncertain_points(torch.zeros(0, 8, 8), 16).shape == (0, 16, 2)
