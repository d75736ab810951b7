"""Members: a network with fewer layers or queries, or for another size, is the one that would be built so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import dfine_peer
import ec_peer
import pytest
import rtdetr_peer
import torch
from torch import Tensor, nn

from detr_exp.model.member import Member, become, outputs_of
from detr_exp.structures import Outputs, Prediction, leaves

DINO = [
    "model=rfdetr",
    *(f"model.backbone.{key}" for key in ("width=32", "num_heads=2", "patch_size=8", "out_blocks=[1,2]")),
    *("model.image_size=[64,96]", "model.neck.num_bottlenecks=1", "model.num_cross_heads=4", "model.num_groups=3"),
    *("model.hidden_dim=32", "model.dim_feedforward=48", "model.num_queries=24", "model.num_layers=3"),
]
NARROW = ["model.image_size=[64,96]", "model.hidden_dim=32", "model.dim_feedforward=48", "model.num_groups=3"]
THREE = ["model.num_layers=3", "model.num_queries=24"]
FAMILIES = {
    "rtdetrv2": [*rtdetr_peer.SMALL, *THREE],
    "learned": [*rtdetr_peer.SMALL, *THREE, "model.learn_query_content=true"],
    "early": [*rtdetr_peer.SMALL, *THREE, "model.eval_idx=1"],
    "dfine": [*dfine_peer.SMALL, *THREE],
    "deimv2": ["model=deimv2_atto", "model.image_size=[96,128]", *THREE],
    "pyramid": ["model=ecseg_s", *ec_peer.SMALL[1:], *THREE],
    "poses": ["model=ecpose_s", *ec_peer.SMALL[1:], *THREE],
    "rfdetr": DINO,
    "lwdetr": [
        *("model=lwdetr_tiny", *NARROW, *THREE, "model.num_cross_heads=4", "model.neck.num_bottlenecks=1"),
        *("model.backbone.width=32", "model.backbone.num_heads=2", "model.backbone.depth=2"),
        *("model.backbone.windowed=[0]", "model.backbone.taps=[0,1]", "model.backbone.num_windows=2"),
    ],
    "masks": ["model=rfdetr_seg_tiny", *NARROW, "model.num_layers=3", "model.num_queries=24"],
    "keypoints": ["model=rfdetr_keypoint_tiny", *NARROW, "model.num_layers=3", "model.num_queries=24"],
}
KEYPOINTS = ["model.keypoint_counts=[3,0,2,3,0,0,1]"]
Make = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def made(make: Make, randomise: Callable[[nn.Module], nn.Module]) -> Callable[..., nn.Module]:
    def build(family: str, *words: str) -> nn.Module:
        beside = KEYPOINTS if family in ("keypoints", "poses") else []
        return randomise(make(*FAMILIES[family], *beside, *words)).eval()

    return build


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def assert_equal(one: Outputs, other: Outputs) -> None:
    assert one.layers.boxes.shape == other.layers.boxes.shape
    for left, right in zip(leaves(one), leaves(other), strict=True):
        assert torch.equal(left, right)


def words_of(member: Member, family: str) -> list[str]:
    """Those with which a network of that extent is built."""
    layers, queries, (height, width) = member.layers, member.queries, member.image_size
    stays = ["model.backbone.position_grid=8"] if family == "rfdetr" else []
    return [
        f"model.num_layers={layers}",
        *(
            ["model.eval_idx=-1"]
            if family in ("rtdetrv2", "learned", "early", "dfine", "deimv2", "pyramid", "poses")
            else []
        ),
        f"model.num_queries={queries}",
        f"model.image_size=[{height},{width}]",
        *stays,
    ]


def cut_to(whole: dict[str, Tensor], smaller: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a smaller network: those of its names, and of its queries, which are the first ones."""
    found = {}
    for name, tensor in smaller.items():
        rows = tuple(slice(0, length) for length in tensor.shape)
        found[name] = whole[name][rows]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_member_is_the_network_that_would_be_built_so(family: str, made: Make) -> None:
    words = ["model.backbone.position_grid=8"] if family == "rfdetr" else []
    whole = made(family, *words)
    member = Member(2, 11, (128, 96))
    alone = made(family, *words_of(member, family))
    alone.load_state_dict(cut_to(whole.state_dict(), alone.state_dict()))
    whole.set_member(member)
    assert (whole.num_queries, whole.image_size) == (alone.num_queries, alone.image_size)
    assert_equal(whole(images((128, 96))), alone(images((128, 96))))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_members_from_shared_passes_equal_separate_ones(family: str, made: Make) -> None:
    network, size = made(family), (128, 96)
    members = [Member(layers, queries, size) for layers in (1, 2, 3, None) for queries in (5, 12, None)]
    found = {member: copy.deepcopy(outputs) for member, outputs in outputs_of(network, images(size), members)}
    assert set(found) == set(members)
    assert network.member == Member()
    for member, outputs in found.items():
        shared = network.postprocess(outputs, torch.tensor([[40, 60], [90, 50]]), member.queries)
        network.set_member(member)
        alone = network(images(size))
        assert_equal(outputs, alone)
        for one, other in zip(shared, network.postprocess(alone, torch.tensor([[40, 60], [90, 50]]))):
            assert torch.equal(one.boxes, other.boxes)
            assert torch.equal(one.scores, other.scores)
        network.set_member(Member())


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_member_can_be_left_again(family: str, made: Make) -> None:
    network = made(family)
    size = network.image_size
    before = network(images(size))
    network.set_member(Member(1, 3, (64, 64)), every_layer=True)
    network.set_member(Member(layers=2))
    assert network.num_queries == 24
    assert network.image_size == size
    network.set_member(Member())
    assert_equal(before, network(images(size)))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_computes_the_layers_and_queries_of_the_member(family: str, made: Make, targets) -> None:
    network = made(family).train()
    network.set_member(Member(2, 11, (64, 64)))
    outputs = network(images((64, 64), batch=3), replace(targets, keypoints=torch.zeros(3, 3, 3)))
    assert outputs.layers.boxes.shape[:3] == (2, 3, 11 * outputs.groups)
    sum(part.square().sum() for part in leaves(outputs) if part.is_floating_point()).backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    third = ("decoder.layers.2.", "decoder.dec_score_head.2.", "layers.2.", "mask_head.blocks.2.")
    assert not [name for name in reached if name.startswith(third)]
    assert [name for name in reached if name.startswith(("decoder.layers.1.", "layers.1."))]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_folding_drops_what_a_member_does_not_use(family: str, made: Make) -> None:
    whole, member = made(family), made(family)
    member.set_member(Member(1, 7, (64, 64)))
    before = member(images((64, 64))).pred
    all_of_it = sum(parameter.numel() for parameter in whole.deploy().parameters())
    assert sum(parameter.numel() for parameter in member.deploy().parameters()) < all_of_it
    after = member(images((64, 64))).pred
    assert after.boxes.shape == (2, 7, 4)
    torch.testing.assert_close(ordered(after), ordered(before), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"at.layers is 2.*after 1 layers: at.layers=1"):
        member.set_member(Member(layers=2))


def ordered(pred: Prediction) -> Tensor:
    """Boxes without the order of their queries, which the last digits decide."""
    return pred.boxes.flatten(0, 1).sort(dim=0).values


WRONG = [
    (Member(layers=4), "at.layers is 4.*1 to 3 layers: at.layers=3"),
    (Member(queries=25), "at.queries is 25.*trained with 24.*at.queries=24"),
    (Member(image_size=(100, 64)), r"at.image_size is \[100, 64\].*multiples of"),
    (Member(queries=24, image_size=(32, 32)), "24 queries are too many for images of 32 x 32.*at.queries="),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("member", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_what_cannot_be_without_training(family: str, member: Member, message: str, made: Make) -> None:
    network = made(family)
    if family in ("masks", "keypoints") and "too many" in message:
        member = Member(queries=24, image_size=(16, 16))  # finer maps have more cells
        message = message.replace("32 x 32", "16 x 16")
    with pytest.raises(ValueError, match=message):
        network.set_member(member)
    assert network.member == Member()


class Unbending(nn.Module):
    """A decoder of somebody else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.strides = inner, getattr(inner, "strides", [])

    def forward(self, *parts: object) -> object:
        return self.inner(*parts)


@pytest.mark.parametrize(("family", "place"), [("rtdetrv2", "decoder"), ("masks", "mask_head"), ("rfdetr", "layers")])
def test_parts_of_others_that_cannot_stop(family: str, place: str, made: Make) -> None:
    network = made(family)
    setattr(network, place, Unbending(getattr(network, place)))
    with pytest.raises(ValueError, match=r"at.layers is 2, but Unbending.*lacks .*depth.*at.layers=null"):
        network.set_member(Member(layers=2))
    network.set_member(Member(image_size=(64, 64)))  # which needs nothing of it
    assert network.image_size == (64, 64)


def test_networks_of_others() -> None:
    become(nn.Identity(), Member())
    with pytest.raises(ValueError, match=r"at.queries is set, but Identity.*Elastic.*at.queries=null"):
        become(nn.Identity(), Member(queries=3))


def test_a_backbone_of_one_size_says_so(make: Make) -> None:
    words = ["model/backbone=timm", "model.backbone.name=vit_tiny_patch16_224", "model.backbone.pretrained=false"]
    sizes = [
        "model.backbone.out_strides=[16]",
        "+model.backbone.options.depth=3",
        "model.image_size=[224,224]",
        "model.neck.levels=[P4]",
    ]
    network = make("model=rfdetr", *words, *sizes, "model.num_layers=1", "model.hidden_dim=32").eval()
    with pytest.raises(ValueError, match=r"at.image_size is \[192, 192\], but parts.*at.image_size=null"):
        become(network, Member(image_size=(192, 192)))


def names() -> Iterator[tuple[Member, str]]:
    yield Member(), "whole"
    yield Member(2, 100, (320, 320)), "l2-q100-320"
    yield Member(queries=100, image_size=(320, 480)), "q100-320x480"


@pytest.mark.parametrize(("member", "name"), names())
def test_members_have_names(member: Member, name: str) -> None:
    assert str(member) == name
