"""Batches as pure functions of (seed, epoch), on any number of ranks."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import chain

import pytest

from detr_exp.data.phases import Phases
from detr_exp.data.sampler import EvalSampler, TrainSampler, multi_scale_sizes

SIZES = [(64, 64), (96, 96), (128, 128)]


def images(sampler: TrainSampler | EvalSampler) -> list[list[int]]:
    return [[key.image for key in batch] for batch in sampler]


def test_an_epoch_is_a_permutation_without_remainder():
    sampler = TrainSampler(23, 4, 0, (64, 64))
    assert len(sampler) == 5
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = images(sampler)
        assert [len(batch) for batch in batches] == [4] * 5
        assert max(Counter(chain(*batches)).values()) == 1
        assert all(key.epoch == epoch for batch in sampler for key in batch)


def test_epochs_and_seeds_differ_and_repeat():
    def epoch(seed: int, number: int) -> list:
        sampler = TrainSampler(50, 5, seed, (64, 64), sizes=SIZES)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 3) == epoch(0, 3)
    assert epoch(0, 3) != epoch(0, 4) != epoch(1, 4)


def test_a_resumed_epoch_goes_on_where_it_stopped():
    sampler = TrainSampler(40, 4, 7, (64, 64), sizes=SIZES)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_start(6)
    assert list(sampler) == whole[6:]
    assert len(sampler) == len(whole)
    sampler.set_epoch(2)
    assert list(sampler) == whole


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_set_smaller_than_a_batch_is_repeated(count):
    sampler = TrainSampler(count, 8, 0, (64, 64))
    (batch,) = images(sampler)
    assert len(batch) == len(set(batch)) == 8  # a repeated image has another number, hence another augmentation
    used = Counter(image % count for image in batch)
    assert max(used.values()) - min(used.get(i, 0) for i in range(count)) <= 1


def test_ranks_share_the_same_batches():
    """Eight images a step are the same eight, whether one rank takes them or four."""

    def steps(world_size: int) -> list[set[int]]:
        ranks = [
            images(TrainSampler(50, 8 // world_size, 3, (64, 64), rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        return [set(chain(*parts)) for parts in zip(*ranks, strict=True)]

    assert steps(1) == steps(2) == steps(4)


def test_the_batches_of_a_step_have_one_size_however_it_is_cut():
    """Two ranks take the step that one takes in two batches; a resumed epoch goes on with the same sizes."""

    def sizes(batch_size: int, step_batches: int, start: int = 0, **ranks: int) -> list[int]:
        sampler = TrainSampler(410, batch_size, 0, (64, 64), sizes=SIZES, step_batches=step_batches, **ranks)
        sampler.set_start(start)
        return [batch[0].height for batch in sampler]

    whole = sizes(8, 1)
    assert set(whole) == {64, 96, 128}
    cut = sizes(2, 4)
    assert [cut[4 * i : 4 * i + 4] for i in range(51)] == [[side] * 4 for side in whole[:51]]
    assert sizes(2, 2, rank=1, world_size=2) == [side for side in whole for _ in range(2)][: 410 // 4]
    assert sizes(2, 4, start=8) == cut[8:]


def test_sizes_are_sampled_per_batch_and_are_the_same_on_every_rank():
    samplers = [TrainSampler(400, 2, 0, (64, 64), sizes=SIZES, rank=rank, world_size=2) for rank in range(2)]
    drawn = [[{(key.height, key.width) for key in batch} for batch in sampler] for sampler in samplers]
    assert drawn[0] == drawn[1]
    assert all(len(sizes) == 1 for sizes in drawn[0])
    assert set.union(*drawn[0]) == set(SIZES)


def test_sizes_are_fixed_in_the_last_epochs():
    sampler = TrainSampler(40, 2, 0, (80, 80), sizes=SIZES, phases=Phases(5))
    sampler.set_epoch(4)
    assert {key.height for batch in sampler for key in batch} <= {64, 96, 128}
    sampler.set_epoch(5)
    assert {key.height for batch in sampler for key in batch} == {80}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(world_size):
    samplers = [EvalSampler(range(10), 4, (64, 64), rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = sorted(chain(*(chain(*images(sampler)) for sampler in samplers)))
    assert seen == list(range(10))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


def test_rtdetrs_sizes_are_the_published_ones():
    sides = [height for height, _ in multi_scale_sizes("rtdetr", (640, 640), 32)]
    assert sorted(sides) == [480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800]


@pytest.mark.parametrize(
    ("side", "stride", "sides"),
    [
        (384, 32, range(224, 545, 32)),
        (560, 56, range(280, 841, 56)),
        (312, 12, range(252, 373, 12)),
        (96, 32, range(64, 257, 32)),
    ],
)
def test_rfdetrs_sizes_are_the_published_ones(side, stride, sides):
    found = multi_scale_sizes("rfdetr", (side, side), stride)
    assert sorted(height for height, _ in found) == list(sides)
    assert all(height == width for height, width in found)


def test_sides_keep_their_proportion():
    assert multi_scale_sizes([480, 960], (320, 640), 32) == [(256, 480), (480, 960)]
    assert multi_scale_sizes(None, (320, 640), 32) == [(320, 640)]
    assert all(h % 32 == w % 32 == 0 for h, w in multi_scale_sizes("rtdetr", (352, 640), 32))


@pytest.mark.parametrize(
    ("rule", "size", "message"),
    [
        ("both", (64, 64), r"data\.multi_scale is 'both'"),
        ([48], (64, 64), r"data\.multi_scale has \[48\].*data\.multi_scale=\[64\]"),
        (None, (65, 64), r"model\.image_size=\[64,64\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(rule, size, message):
    with pytest.raises(ValueError, match=message):
        multi_scale_sizes(rule, size, 32)


CANVASES = [SIZES[i % 3] for i in (0, 1, 0, 0, 1, 2, 0, 1, 1, 0, 0, 1, 0)] * 4


@pytest.mark.parametrize("step_batches", [1, 2])
def test_batches_have_images_of_one_shape_and_every_image_is_used_once(step_batches):
    def sampler(**settings):
        return TrainSampler(len(CANVASES), 2, 0, (64, 128), step_batches=step_batches, canvases=CANVASES, **settings)

    usual = TrainSampler(len(CANVASES), 2, 0, (64, 128))
    whole = list(sampler())
    assert len(whole) == len(sampler()) == len(usual)
    assert sorted(key.image for batch in whole for key in batch) == list(range(len(CANVASES)))
    shapes = [{(key.height, key.width) for key in batch} for batch in whole]
    assert all(len(shape) == 1 for shape in shapes)
    own = [batch for batch in whole if all((key.height, key.width) == CANVASES[key.image] for key in batch)]
    assert len(own) >= len(whole) - 3 * step_batches, "what is left of three shapes has the size of the network"
    assert all(shapes[i] == shapes[i + 1] for i in range(0, len(shapes) - 1, step_batches) if step_batches == 2)
    order = [min(shape) for shape in shapes]
    assert order != sorted(order), "shapes are mixed"
    resumed = sampler()
    resumed.set_start(7)
    assert list(resumed) == whole[7:]
    shuffled = sampler()
    shuffled.set_epoch(1)
    assert list(shuffled) != whole


def test_ranks_share_the_steps_of_one_shape():
    def batches(batch_size, rank, world_size):
        return list(
            TrainSampler(
                *(len(CANVASES), batch_size, 0, (64, 128)), canvases=CANVASES, rank=rank, world_size=world_size
            )
        )

    alone, ranks = batches(4, 0, 1), [batches(2, rank, 2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks)] == alone


def test_evaluation_batches_have_one_shape_and_every_image_once():
    sampler = EvalSampler(range(len(CANVASES)), 4, (64, 128), canvases=CANVASES)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(key.image for batch in batches for key in batch) == list(range(len(CANVASES)))
    assert all((key.height, key.width) == CANVASES[key.image] for batch in batches for key in batch)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_batches_know_what_the_same_worker_makes_next(workers, training):
    sampler = TrainSampler(22, 3, 0, (64, 64)) if training else EvalSampler(range(20), 3, (64, 64))
    sampler.turns = workers
    batches = list(sampler)
    assert [list(batch.coming) for batch in batches] == [*batches[workers:], *[[]] * workers]
    assert pickle.loads(pickle.dumps(batches[0])).coming == batches[workers]
