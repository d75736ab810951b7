import pytest
import torch

from detr_exp.model.head.keypoint import attention_among
from detr_exp.model.layer.group_queries import Start
from detr_exp.model.layer.keypoint_decoder_layer import KeypointDecoderLayer, KeypointStart
from detr_exp.model.layer.memory import Memory

COUNTS = (2, 3)


def layer():
    torch.manual_seed(0)
    made = KeypointDecoderLayer(hidden_dim=16, num_heads=2, num_cross_heads=4, points_per_level=[2], dim_feedforward=24)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "cross_attn" in name or name == "scale":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def inputs():
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    return dict(
        queries=random(2, 6, 16),
        keypoints=random(2, 6, 5, 16),
        position=random(2, 6, 16),
        keypoint_position=random(5, 16),
        allowed=attention_among(COUNTS),
        reference=random(2, 6, 4),
        memory=random(2, 20, 16),
        keypoint_memory=random(2, 20, 16),
    )


def passed(made, queries, keypoints, position, keypoint_position, allowed, reference, memory, keypoint_memory):
    """Queries and their keypoints after the layer."""
    own, theirs = (Memory(cells, [(4, 5)], None) for cells in (memory, keypoint_memory))
    start = Start(queries, position, reference, groups=2)
    return made(queries, keypoints, start, KeypointStart(keypoints, keypoint_position, allowed, theirs), own)


def moved(name, place):
    """How far queries and keypoints of image 0 move when one input does."""
    given = inputs()
    before = passed(layer(), **given)
    given[name] = given[name].clone()
    given[name][place] += 1
    after = passed(layer(), **given)
    return [(b - a).abs().amax(-1)[0] > 1e-6 for a, b in zip(before, after)]


def test_keypoints_of_one_class_move_those_of_no_other():
    queries, keypoints = moved("keypoints", (0, 3, 0))
    assert queries.tolist() == [False, False, False, True, False, False]
    assert keypoints[3].tolist() == [True, True, False, False, False]
    assert not keypoints[[0, 1, 2, 4, 5]].any()


def test_queries_move_their_group_and_all_their_keypoints():
    queries, keypoints = moved("queries", (0, 3))
    assert queries.tolist() == [False, False, False, True, True, True]
    assert keypoints[3:].all()
    assert not keypoints[:3].any()


@pytest.mark.parametrize(("name", "reached"), [("memory", (True, True)), ("keypoint_memory", (False, True))])
def test_each_stream_reads_its_own_map(name, reached):
    queries, keypoints = moved(name, (0, slice(None)))
    assert (queries.any().item(), keypoints.any().item()) == reached


def test_every_weight_is_used():
    made = layer()
    queries, keypoints = passed(made, **inputs())
    ((queries * torch.randn_like(queries)).sum() + (keypoints * torch.randn_like(keypoints)).sum()).backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []
