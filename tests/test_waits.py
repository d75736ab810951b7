"""Nothing in a step waits for a GPU but the matcher; shown without one, for networks and losses of `conf/`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from detr_exp import build
from detr_exp.config.compose import CONF_DIR, compose
from detr_exp.data.classes import KnownLabels
from detr_exp.data.keypoints import KeypointSchema
from detr_exp.matcher import hungarian
from detr_exp.structures import Batch, Detections, Outputs, Targets, on_host
from detr_exp.trainer.ema import EMA
from detr_exp.trainer.evaluation import as_float32
from detr_exp.trainer.precision import Precision
from tests import fake_cuda
from tests.fake_cuda import CUDA, WaitError

SCHEMA = KeypointSchema([["a", "b"], ["c"]], [[], []], [[], []], [0.05, 0.05], False)
LABELS = KnownLabels(2, ["x", "y"], keypoints=SCHEMA)
COUNTS = (3, 0)
SMALL = {
    "num_layers": 1,
    "num_groups": 2,
    "num_queries": 8,
    "num_denoising": 4,
    "depth_mult": 0.34,
    "num_bottlenecks": 1,
}
LOSSES = sorted(path.stem for path in (CONF_DIR / "loss").glob("*.yaml"))
SIGMOID = [loss for loss in LOSSES if "activation: sigmoid" in (CONF_DIR / f"loss/{loss}.yaml").read_text()]
MODELS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
TINY = [name for name in MODELS if name.endswith("_tiny")]
BACKBONES = sorted(path.stem for path in (CONF_DIR / "model/backbone").glob("*.yaml"))


@functools.cache
def network_of(*words: str) -> torch.nn.Module:
    """A network with few layers and queries, on the fake device."""
    with _disable_current_modes():
        cfg = compose(["data=shapes", "trainer/hardware=cpu", *words])
        for part in (cfg.model, cfg.model.neck):
            part.update({key: value for key, value in SMALL.items() if part.get(key)})
        return fake_cuda.on_cuda(build.network(cfg, LABELS))


def fits(model: str, loss: str) -> bool:
    """Whether the network has all that the loss refers to."""
    try:
        OmegaConf.to_container(compose(["data=shapes", f"model={model}", f"loss={loss}"]).loss, resolve=True)
    except InterpolationKeyError:
        return False
    return True


@functools.cache
def criterion_of(*words: str) -> torch.nn.Module:
    return build.criterion(compose(["data=shapes", "trainer/hardware=cpu", *words]), LABELS)


@pytest.fixture(scope="module")
def fake() -> Iterator[None]:
    with fake_cuda.fake_cuda():
        yield


def batch_of(network: torch.nn.Module, counts: tuple[int, ...], padded: bool = False) -> Batch:
    """A batch on the device, with whatever the network's tasks need; sizes of images stay on the host."""
    total, (height, width) = sum(counts), network.image_size
    targets = Targets(
        labels=torch.zeros(total, dtype=torch.int64),
        boxes=torch.zeros(total, 4),
        counts=counts,
        masks=torch.zeros(total, height, width, dtype=torch.bool) if "masks" in network.tasks else None,
        keypoints=torch.zeros(total, 2, 3) if "keypoints" in network.tasks else None,
    )
    images = torch.zeros(len(counts), height, width, 3, dtype=torch.uint8)
    mask = torch.zeros(len(counts), height, width, dtype=torch.bool) if padded else None
    sizes = torch.zeros(len(counts), 2, dtype=torch.int64)
    batch = Batch(images, targets, sizes, padding_mask=mask).pin_memory().to(CUDA, non_blocking=True)
    batch.image_sizes = torch.tensor([[30 + i, 40] for i in range(len(counts))])
    return batch


@functools.cache
def trained(*words: str, counts: tuple[int, ...] = COUNTS, padded: bool = False) -> tuple[Batch, Outputs]:
    """A batch and its outputs in training, in bf16; losses of one activation share them."""
    network = network_of(*words).train()
    batch = batch_of(network, counts, padded)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = network(batch.pixels(), batch.targets, batch.padding_mask)
    check(outputs)
    return batch, as_float32(outputs)


def step(*words: str, counts: tuple[int, ...] = COUNTS, padded: bool = False) -> None:
    """Forward pass and losses in training; then, in evaluation, in float32, losses and post-processing."""
    batch, outputs = trained(*words, counts=counts, padded=padded)
    criterion, network = criterion_of(*words), network_of(*words)
    check(criterion(outputs, batch.targets, num_boxes=len(batch.targets), num_images=2))
    network.eval()
    outputs = network(batch.pixels(), padding_mask=batch.padding_mask)
    check(outputs)
    check(criterion(outputs, batch.targets, num_boxes=len(batch.targets)))
    for one in network.postprocess(outputs, batch.image_sizes):
        check([one.scores, one.labels, one.boxes])


def check(tree: object) -> None:
    for tensor in tree_leaves(tree):
        assert not isinstance(tensor, torch.Tensor) or tensor.device == CUDA


@pytest.mark.parametrize("model", [pytest.param(one, marks=[pytest.mark.slow] * ("dfine" in one)) for one in TINY])
def test_a_step_and_an_evaluation_wait_for_nothing_but_the_matcher(model: str, fake: None) -> None:
    step(f"model={model}", "loss=vfl")


@pytest.mark.parametrize("loss", SIGMOID)
def test_no_loss_waits(loss: str, fake: None) -> None:
    criterion = criterion_of("model=rtdetrv2_tiny", f"loss={loss}")
    batch, outputs = trained("model=rtdetrv2_tiny", "loss=vfl")
    before = hungarian.to_host.call_count
    check(criterion(outputs, batch.targets, num_boxes=torch.ones((), device=CUDA)))
    assert hungarian.to_host.call_count == before + 1


def test_optimiser_and_average_wait_for_nothing(fake: None) -> None:
    with _disable_current_modes():
        network = fake_cuda.on_cuda(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    ema, precision = EMA(network, decay=0.9, tau=10), Precision(CUDA, torch.bfloat16, torch.contiguous_format)
    for _ in range(2):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        norm, skipped = precision.step(optimizer, list(network.parameters()), 0.1, torch.zeros((), device=CUDA))
        ema.update(skipped)
        check([norm, skipped, ema.average])


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_no_pair_of_network_and_loss_waits(model: str, loss: str, fake: None) -> None:
    if not fits(model, loss):
        pytest.skip(f"loss={loss} is for other networks")
    step(f"model={model}", f"loss={loss}")
    step(f"model={model}", f"loss={loss}", counts=(0, 0), padded=True)
    network_of.cache_clear(), trained.cache_clear()  # hundreds of networks


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_backbone_waits(backbone: str, fake: None) -> None:
    model = "rfdetr" if backbone.startswith("dinov2") else "rtdetrv2"
    step(f"model={model}", f"model/backbone={backbone}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("model=rtdetrv2_tiny", "model.num_denoising=0"),
        ("model=rtdetrv2_tiny", "model.cross_attn_method=discrete"),
        ("model=rtdetrv2_tiny", "model.query_select_method=one2many"),
        ("model=rtdetrv2_tiny", "loss.share_matched_indices=true", "loss.boxes_weight_format=giou"),
        ("model=rtdetrv2_tiny", "loss.aux_loss=false"),
        ("model=rfdetr_seg_tiny", "model.mask_head=null"),
    ],
)
def test_no_setting_waits(words: tuple[str, ...], fake: None) -> None:
    step(*words)


@pytest.mark.parametrize(
    "wait",
    [
        lambda one: one.sum().item(),
        lambda one: one.tolist(),
        lambda one: one.nonzero(),
        lambda one: one[one > 0],
        lambda one: bool((one > 0).any()),
        lambda one: one.cpu(),
        lambda one: one.to("cpu", non_blocking=True),
        lambda one: one[[0, 1]],
        lambda one: one[torch.arange(2)],
        lambda one: one + torch.tensor([1.0, 2.0, 3.0], device=CUDA),
        lambda one: one.copy_(torch.zeros(3)),
        lambda one: torch.zeros(3).to(CUDA),
        lambda one: torch.zeros(3).to(CUDA, non_blocking=True),
        lambda one: one.repeat_interleave(torch.ones(3, dtype=torch.int64, device=CUDA)),
    ],
)
def test_what_waits_is_found(wait: Callable[[torch.Tensor], object], fake: None) -> None:
    with pytest.raises((WaitError, DataDependentOutputException, DynamicOutputShapeException)):
        wait(torch.zeros(3, device=CUDA))


def test_a_batch_goes_to_the_device_from_page_locked_memory_and_its_sizes_stay(fake: None) -> None:
    network = network_of(f"model={TINY[-1]}")
    batch = batch_of(network, COUNTS)
    check([batch.images, batch.targets.labels, batch.targets.boxes])
    assert batch.image_sizes.device.type == "cpu"
    with pytest.raises(WaitError):
        Batch(torch.zeros(1, 8, 8, 3), Targets(torch.zeros(1), torch.zeros(1, 4), (1,)), torch.zeros(1, 2)).to(CUDA)


def test_detections_come_to_the_host_with_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, copies = [], []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: mock.Mock(synchronize=lambda: waits.append(device))
    )
    monkeypatch.setattr(fake_cuda.NoWaits, "refuse_copy", lambda self, source, target, free: copies.append(free))
    with fake_cuda.fake_cuda():
        found = [Detections(*(torch.zeros(5, device=CUDA) for _ in range(3))) for _ in range(4)]
        assert {one.boxes.device.type for one in on_host(found)} == {"cpu"}
    assert waits == [CUDA]
    assert copies
    assert all(copies)
