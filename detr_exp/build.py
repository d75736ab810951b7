"""Builds the parts of an experiment from a config, and passes each part what it needs from the others.

Groups do not depend on each other. Values that a group needs from another are passed here: classes from the data, image
size and stride from the model, the activation from the class loss, learning rates from the optimiser.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from detr_exp.config.compose import compose as compose
from detr_exp.config.compose import refuse_unready
from detr_exp.config.instantiation import arguments_of, instantiate
from detr_exp.config.keys import SELECTION
from detr_exp.config.mistakes import ConfigError
from detr_exp.config.stored import with_derived_nodes
from detr_exp.config.targets import TARGET, refuse_missing_members, refuse_unknown_targets, refuse_wrong_arguments
from detr_exp.config.unused import references, refuse_unused_keys
from detr_exp.values import Values, values_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from detr_exp.data.dataset import DataSet
    from detr_exp.loss.criterion import SetCriterion
    from detr_exp.model.adapter.slim import BaseFile
    from detr_exp.protocols import Labels, Metric, Network
    from detr_exp.trainer.hardware import Hardware
    from detr_exp.trainer.state import Run
    from detr_exp.trainer.teaching import Teaching
    from detr_exp.trainer.trainer import Trainer

RATES = ("lr", "lr_backbone", "weight_decay")  # arguments of parameter groups
IOU_TYPES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}  # IoU type of a metric -> its task
WARMUP = ("warmup", "warmup_unit", "warmup_shape")
FROM_OTHER_GROUPS = ("num_classes", "activation")  # arguments of the network from other groups
NOT_ARGUMENTS = ("weights", "adapter", "class_prior")  # keys of `model` that are not arguments of its constructor


def data(cfg: DictConfig) -> DataSet:
    """The data set: `classes`, `category_ids`, `num_classes`, splits and `loader`."""
    return _instantiated(cfg, "data")


def network(cfg: DictConfig, data: Labels | None = None, anew: Collection[str] | None = None) -> Network:
    """The network, with the weights of `model.weights` and the adapter of `model.adapter`, if set.

    Args:
        cfg: see `compose`.
        data: has the classes; None: `data.num_classes`, or the data set of the config if that is null.
        anew: names of parameters that are trained in full beside an adapter; None: those that the weights do not set.

    Raises:
        ValueError: image size, stride, weights, adapter or classes do not fit each other.
    """
    return started(cfg, data, anew)[0]


def started(cfg: DictConfig, data: Labels | None = None, anew: Collection[str] | None = None) -> tuple[Network, str]:
    """As `network`, and how much of it is from the file of `model.weights`, in words; empty without a file."""
    from detr_exp import start
    from detr_exp.model.construction import settle

    adapts = has_adapter(cfg)
    cfg, sizes = start.of_one_size(cfg)
    if data is None and cfg.data.num_classes is None:
        data = _instantiated(cfg, "data")
    arguments = [name for name in arguments_of(_settings(cfg, "model")) if name not in NOT_ARGUMENTS]
    refuse_unused_keys(cfg, "model", [name for name in arguments if name not in FROM_OTHER_GROUPS], NOT_ARGUMENTS)
    count = cfg.data.num_classes if data is None else data.num_classes
    extra: Values = {"num_classes": count, "activation": cfg.loss.activation}
    if "keypoint_counts" in arguments and "keypoint_counts" in cfg.model:
        from detr_exp.data.keypoints import of_network

        known = data is not None or cfg.model.keypoint_counts is not None
        labels = data if known else _instantiated(cfg, "data")
        points = of_network(labels, cfg.model.keypoint_counts, cfg.model._target_)
        extra |= {name: value for name, value in points.items() if name in arguments}
    found = start.find(cfg.model.weights)
    made: Network = _instantiated(start.for_weights(cfg) if found else cfg, "model", only=arguments, **extra)
    channels, fit = (OmegaConf.select(cfg, f"data.{name}") for name in ("channels", "fit"))
    settle(made, sizes, channels or 3, fit, count, cfg.model.get("class_prior"))
    if found is None:
        return made, ""
    classes = None if data is None else data.classes or None
    if not adapts:
        return made, start.load(made, found, classes)
    adapter = instantiate(_settings(cfg, "model")["adapter"], "model.adapter")
    return made, start.load_adapted(made, found, classes, adapter, anew)


def has_adapter(cfg: DictConfig) -> bool:
    """Whether an adapter is trained in place of the initial weights of the network.

    Raises:
        ConfigError: `model.weights` is null.
    """
    if cfg.model.get("adapter") is None:
        return False
    if cfg.model.weights is None:
        raise ConfigError(
            f"model.adapter is {cfg.model.adapter._target_.rpartition('.')[2]}, but there are no weights to "
            "adapt; set them, model.weights=<file>, or train the whole network: model/adapter=none"
        )
    return True


def base(cfg: DictConfig) -> BaseFile | None:
    """The file with the weights that an adapter does not change, to which checkpoints refer; None: without an adapter.

    Raises:
        ValueError: the file does not exist.
    """
    if not has_adapter(cfg):
        return None
    from detr_exp import start
    from detr_exp.model.adapter.slim import BaseFile

    found = start.find(cfg.model.weights)
    return None if found is None else BaseFile(str(found.path.resolve()), found.sha256)


def criterion(cfg: DictConfig, data: DataSet | None = None) -> SetCriterion:
    """The losses: `criterion(outputs, targets, num_boxes)` gives weighted terms and their `total`.

    Args:
        cfg: see `compose`.
        data: has classes, keypoints, and for `loss.class_weights` training objects; see `network`.
    """
    from detr_exp.loss.class_weights import class_weights, refuse_smoothing, warn_of_unlearned
    from detr_exp.loss.criterion import SetCriterion

    terms = _instantiated(cfg, "loss")
    weights = terms.pop("class_weights", None)
    if data is None and (cfg.data.num_classes is None or weights is not None):
        data = _instantiated(cfg, "data")
    if data is not None:
        weights = class_weights(weights, data)
        refuse_smoothing(terms, data)
        warn_of_unlearned(terms["terms"], data)
    accepted = inspect.signature(SetCriterion).parameters
    schema = None if data is None else data.keypoints
    sigmas = [] if schema is None else schema.sigmas
    scales: Values = {"keypoint_sigmas": sigmas} if "keypoint_sigmas" in arguments_of(_settings(cfg, "matcher")) else {}
    return SetCriterion(
        num_classes=cfg.data.num_classes if data is None else data.num_classes,
        matcher=_instantiated(cfg, "matcher", activation=cfg.loss.activation, **scales),
        keypoint_counts=() if schema is None else schema.counts,
        keypoint_sigmas=sigmas,
        class_weights=weights,
        **{name: term for name, term in terms.items() if name in accepted},
    )


def teaching(cfg: DictConfig, network: Network, losses: SetCriterion, data: DataSet) -> Teaching | None:
    """The teacher of a training, with what connects it with the network; None: without a teacher.

    Raises:
        ValueError: teacher, loss, network and data do not fit each other.
    """
    from detr_exp.trainer.teacher_cache import OF_CACHE, Caching
    from detr_exp.trainer.teaching import connected, refuse_absent

    if cfg.get("teacher") is None:
        refuse_absent(losses)
        return None
    settings = _settings(cfg, "teacher")
    extra = {"allow_targets": list(cfg.allow_targets)} if "allow_targets" in arguments_of(settings) else {}
    made = _instantiated(cfg, "teacher", settings.keys() - OF_CACHE, **extra)
    caching, fit = Caching.of(settings, data.augment), OmegaConf.select(cfg, "data.fit")
    return connected(made, network, data.classes, losses, caching, fit)


def trainer(cfg: DictConfig) -> Trainer:
    """The trainer, with its settings."""
    from detr_exp.trainer.trainer import Trainer

    return Trainer(_instantiated(cfg, "trainer"))


def hardware(cfg: DictConfig) -> Hardware:
    """The hardware settings."""
    return instantiate(_settings(cfg, "trainer")["hardware"], "trainer.hardware")


def plain(cfg: DictConfig) -> Values:
    """The resolved config for checkpoints and trackers: plain values, with secrets masked."""
    from detr_exp.tracker.secrets import masked

    return masked(values_of(cfg))


def run(cfg: DictConfig, output_dir: Path, *, identity: str = "", resume_from: Path | None = None) -> Run:
    """Everything a training needs.

    Args:
        cfg: see `compose`.
        output_dir: the run folder.
        identity: of the config as it was requested; see `trainer.origin.identity`.
        resume_from: the checkpoint to resume from.

    Raises:
        ValueError: parts do not fit together; nothing was trained.
    """
    from detr_exp import start
    from detr_exp.data.tiles import with_tiles
    from detr_exp.loss.criterion import SetCriterion
    from detr_exp.trainer.batch_size import num_overfit_images
    from detr_exp.trainer.state import Run
    from detr_exp.trainer.trial import pruning_check
    from detr_exp.trainer.validation import refuse_unknown_monitor

    refuse_unready(cfg)
    if references(cfg):  # a config from a file has none; it was checked when it was requested
        refuse_unused_keys(cfg, "loss", inspect.signature(SetCriterion).parameters)
        refuse_unused_keys(cfg, "optim", (*RATES, *WARMUP, "betas", "param_groups", "optimizer", "scheduler"))
    make_optimizer, make_schedule = optimizer(cfg), schedule(cfg)
    data_set = data(cfg)
    overfits = cfg.trainer.overfit_batches is not None  # validates on its training images
    data_set.check(("train",) if overfits else ("train", "val"))
    if overfits:
        data_set = data_set.first(num_overfit_images(cfg.trainer.overfit_batches, cfg.trainer.batch_size))
    data_set = (data_set.halved() if cfg.metric.get(SELECTION) else data_set).sampled()
    base_file = base(cfg)  # hashed before it is read, so that a file that changes in between is noticed
    has_all = resume_from is not None and base_file is None  # of the weights
    made, share = started(start.for_checkpoint(cfg) if has_all else cfg, data_set)
    for split in ("train", "val"):
        data_set.refuse(split, made)
    losses = criterion(cfg, data_set)
    made_run = Run(
        data=data_set,
        network=made,
        criterion=losses,
        make_optimizer=make_optimizer,
        make_schedule=make_schedule,
        make_metric=metric(cfg, data_set, made),
        tracker=_instantiated(cfg, "tracker"),
        config=with_tiles(plain(cfg), data_set.tiles_for(made)),
        output_dir=output_dir,
        seed=cfg.seed,
        identity=identity,
        resume_from=resume_from,
        should_prune=pruning_check(),
        base=base_file,
        start=None if has_all else start.record(cfg.model.weights, made),
        share=share,
        teaching=teaching(cfg, made, losses, data_set),
    )
    refuse_unknown_monitor(made_run, *(cfg.trainer.get(name) for name in ("monitor", "compute_val_loss")))
    return made_run


def optimizer(cfg: DictConfig) -> Callable[..., torch.optim.Optimizer]:
    """Network, and parameters trained beside it -> optimiser over its parameter groups and one for these.

    Raises:
        ValueError: the optimiser does not accept the keys or values given to it.
    """
    from detr_exp.optim.optimizer import refuse_wrong_optimizer
    from detr_exp.optim.param_groups import parameter_groups

    optim = _instantiated(cfg, "optim")
    refuse_wrong_optimizer(optim["optimizer"], optim)
    split = getattr(optim["optimizer"].func, "split", None)  # of optimisers that treat kinds of parameters differently

    def make(network: Network, beside: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
        rates = {name: optim[name] for name in RATES}
        groups = parameter_groups(network, optim["param_groups"], may_idle=has_adapter(cfg), beside=beside, **rates)
        return optim["optimizer"](groups if split is None else split(groups, network))

    return make


def schedule(cfg: DictConfig) -> Callable[[int, int], Callable[[int], float]]:
    """(steps per epoch, total steps) -> (step -> factor of every learning rate)."""
    from detr_exp.optim.scheduler import build_schedule

    optim = _instantiated(cfg, "optim")
    settings = {name: optim[name] for name in WARMUP}

    def make(steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
        return build_schedule(optim["scheduler"], steps_per_epoch=steps_per_epoch, total_steps=total_steps, **settings)

    return make


def metric(
    cfg: DictConfig, data: DataSet, network: Network, category_ids: Sequence[int] | None = None
) -> Callable[..., Metric]:
    """Split -> metric with the ground truth of that split, or of some of its images.

    Args:
        cfg: see `compose`.
        data: has the ground truth.
        network: has the predicted tasks.
        category_ids: category id of every label, if the network was trained on another data set; None: those of `data`.
    """
    from detr_exp.data.keypoints import sigmas_for
    from detr_exp.data.part import restricted

    make = _instantiated(cfg, "metric", only=[name for name in _settings(cfg, "metric") if name != SELECTION])
    if inspect.isclass(make.func):  # checked before annotations are read
        refuse_missing_members(make.func, "metric", cfg.metric[TARGET])
    iou_types = [name for name, task in IOU_TYPES.items() if task in network.tasks]
    ids = data.category_ids if category_ids is None else category_ids
    names, sigmas = dict(zip(data.category_ids, data.classes)), sigmas_for(data, ids, network.keypoint_counts)

    @functools.cache
    def of_split(split: str, image_ids: tuple[int, ...] | None = None) -> Metric:
        whole = data.split(split).truth()
        truth = whole if image_ids is None else restricted(whole, image_ids)
        classes = [names.get(number, f"label {label}") for label, number in enumerate(ids)]
        arguments = dict(truth=truth, category_ids=ids, classes=classes, iou_types=iou_types, keypoint_sigmas=sigmas)
        refuse_wrong_arguments(make, arguments, f"metric: {cfg.metric[TARGET]}")
        return refuse_missing_members(make(**arguments), "metric", cfg.metric[TARGET])

    return of_split


def _instantiated(cfg: DictConfig, group: str, only: Collection[str] | None = None, **extra: object) -> Any:
    """Build what a group's node describes: an object, or for a plain container a dictionary of objects.

    Args:
        cfg: the whole config.
        group: key of the group.
        only: keys that are arguments of the constructor; None: all keys.
        extra: arguments from other groups.

    Raises:
        ConfigError: a `_target_` that is not allowed, or that does not accept the keys given to it.
    """
    settings = _settings(cfg, group)
    if only is not None:
        settings = {name: value for name, value in settings.items() if name in only or name == TARGET}
    return instantiate(settings, group, **extra)


def _settings(cfg: DictConfig, group: str) -> Values:
    """The plain, resolved values of a group, whose targets are all allowed."""
    values = {group: OmegaConf.to_container(cfg[group], resolve=True, throw_on_missing=True)}
    node = with_derived_nodes(values, resolved=True)[group]
    refuse_unknown_targets(node, group, list(cfg.get("allow_targets", [])))
    return node
