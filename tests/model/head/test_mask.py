import torch
from torch.nn import functional as F

from detr_exp.model.head.mask import MaskHead, masks_in_pixels
from detr_exp.structures import MaskLogits


def head():
    torch.manual_seed(0)
    network = MaskHead(hidden_dim=16, num_layers=3, downsample=4)
    torch.nn.init.constant_(network.bias, 0.5)
    return network


def test_masks_are_a_quarter_of_the_image():
    pixels = head().start(torch.randn(2, 16, 3, 4), torch.Size((24, 32)))
    assert pixels.shape == (2, 16, 6, 8)


def test_the_last_layer_is_the_same_with_and_without_the_others():
    network, pixels, queries = head(), torch.randn(2, 16, 6, 8), torch.randn(3, 2, 5, 16)
    every, last = network(pixels, queries), network(pixels, queries[-1:])
    assert every.dense().shape == (3, 2, 5, 6, 8)
    torch.testing.assert_close(last.dense()[0], every.dense()[-1])


@torch.no_grad()
def test_pixels_pass_one_block_for_each_layer_and_none_for_the_encoder():
    network, pixels, queries = head(), torch.randn(1, 16, 6, 8), torch.randn(3, 1, 5, 16)
    asking = network.query_proj(queries + network.query_mlp(queries))
    actual = network(pixels, queries).dense()

    def product(inputs):
        return torch.einsum("bqd,bdhw->bqhw", inputs, network.feature_proj(pixels)) + 0.5

    torch.testing.assert_close(network.of_encoder(pixels, queries[0]).dense(), product(asking[0]))
    for layer, block in enumerate(network.blocks):
        change = F.conv2d(pixels, block.conv.weight, block.conv.bias, padding=1, groups=16).permute(0, 2, 3, 1)
        change = F.gelu(block.linear(F.layer_norm(change, (16,), eps=1e-6)))
        pixels = pixels + change.permute(0, 3, 1, 2)
        torch.testing.assert_close(actual[layer], product(asking[layer]), atol=1e-5, rtol=1e-5)


def test_every_weight_is_used():
    network = head()
    network(torch.randn(1, 16, 6, 8), torch.randn(3, 1, 5, 16)).dense().square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_masks_in_pixels_are_enlarged_before_they_are_cut():
    generator = torch.Generator().manual_seed(0)
    features, queries = torch.randn(2, 8, 5, 7, generator=generator), torch.randn(2, 50, 8, generator=generator)
    masks = MaskLogits(features, queries, torch.tensor([0.1]))
    chosen = torch.randint(0, 50, (40,), generator=generator)
    actual = masks_in_pixels(masks, 1, chosen, (20, 30))
    large = F.interpolate(masks.dense()[1:, chosen], (20, 30), mode="bilinear", align_corners=False)[0]
    assert actual.shape == (40, 20, 30)
    assert (actual != (large > 0)).float().mean() < 1e-3
    assert masks_in_pixels(masks, 0, chosen[:0], (4, 6)).shape == (0, 4, 6)
