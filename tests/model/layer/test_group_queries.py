import torch
from torch.nn import functional as F

from detr_exp.model.layer.group_queries import GroupQueries
from detr_exp.model.layer.memory import Memory
from detr_exp.model.layer.reference import refine_boxes


def queries(num_queries=6):
    torch.manual_seed(0)
    made = GroupQueries(hidden_dim=16, num_logits=4, num_queries=num_queries, num_groups=3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def memory():
    maps = [torch.randn(2, 16, 4, 5), torch.randn(2, 16, 2, 3)]
    return Memory.of([level.requires_grad_() for level in maps], None), maps


def one_by_one(made, cells, proposals, groups):
    """Every group on its own, and all of it on all cells."""
    parts = []
    for group in range(groups):
        seen = F.linear(cells, made.project.weight[group], made.project.bias[group])
        seen = F.layer_norm(seen, (16,), made.norm.weight[group], made.norm.bias[group])
        logits = F.linear(seen, made.class_head.weight[group], made.class_head.bias[group])
        best = logits.max(-1).values.topk(6, dim=1).indices[..., None]
        delta = seen
        for index, layer in enumerate(made.box_head.layers):
            delta = F.linear(F.relu(delta) if index else delta, layer.weight[group], layer.bias[group])
        boxes = refine_boxes(delta, proposals.expand(2, -1, -1))
        parts.append([part.gather(1, best.expand(-1, -1, part.shape[-1])) for part in (seen, logits, boxes)])
    return [torch.cat(part, dim=1) for part in zip(*parts)]


def test_batched_selection_equals_group_by_group_with_all_gradients():
    made = queries()
    cells, maps = memory()
    expected = one_by_one(made, cells.cells, cells.proposals()[0], 3)
    selected, _ = made(cells, 3)
    weights = [torch.randn_like(part) for part in expected]
    wanted = [
        *maps,
        *(p for name, p in made.named_parameters() if not name.startswith(("content", "delta", "position"))),
    ]
    gradients = []
    for parts in (expected, selected):
        for one, other in zip(parts, expected):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        total = sum((part * weight).sum() for part, weight in zip(parts, weights))
        gradients.append(torch.autograd.grad(total, wanted, retain_graph=True))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_references_train_the_queries_and_not_the_image():
    made = queries()
    cells, maps = memory()
    _, start = made(cells, 2)
    assert start.content.shape == start.position.shape == (2, 12, 16)
    torch.testing.assert_close(start.content[0], made.content[:2].flatten(0, 1))
    (start.reference.sum() + start.position.sum()).backward()
    assert made.delta.grad[:2].abs().min() > 0
    assert not made.delta.grad[2].any()
    assert all(level.grad is None for level in maps)
    assert made.box_head.layers[0].weight.grad is None


def test_cells_without_proposal_have_boxes_without_size():
    made = queries(num_queries=180)
    selected, _ = made(Memory.of([torch.randn(1, 16, 3, 60)], None), 1)  # both outer columns are too near the border
    assert selected.boxes.shape == (1, 180, 4)
    sizes = selected.boxes[0, :, 2:].amax(-1)
    assert (sizes == 0).sum() == 6
    assert (selected.boxes[0, sizes == 0] == 0).all()


def test_dropped_groups_are_the_last():
    made = queries()
    cells, _ = memory()
    before, _ = made(cells, 1)
    made.keep_groups(1)
    after, _ = made(cells, 1)
    torch.testing.assert_close(after, before)
    assert made.content.shape[0] == 1
