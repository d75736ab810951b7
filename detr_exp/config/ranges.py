"""Valid ranges of the numbers of a config: one table, checked before anything is read, built or started.

The range belongs to the key that uses a number, even if its value is a reference (`${loss.focal_gamma}`). Keys without
a row, and keys below a user-defined `_target_`, have no range. Conditions on several keys (a width must be a multiple
of the number of heads) are checked by the parts themselves.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from omegaconf import DictConfig

from detr_exp.config.mistakes import ConfigError
from detr_exp.values import Values, flat, is_number, values_of

OUR_TARGETS = ("detr_exp.", "hydra_plugins.detr_exp.", "torch.optim.")


class Range(NamedTuple):
    """Numbers from `least` to `most`.

    Attributes:
        least: lowest value.
        most: highest value.
        whole: integers only.
        above: `least` itself is excluded.
        below: `most` itself is excluded.
        choices: strings that are allowed, too.
        valid: a valid value for the message; None: the lowest.
        advice: added to the message.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False
    choices: tuple[str, ...] = ()
    valid: float | None = None
    advice: str = ""

    def holds(self, value: object) -> bool:
        if not is_number(value):
            return isinstance(value, str) and value in self.choices
        if value != value or abs(value) > sys.float_info.max:  # an integer may be too large for isfinite
            return False
        if self.whole and not isinstance(value, int):
            return False
        over = value > self.least if self.above else value >= self.least
        return over and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low, high = (str(int(limit)) if limit % 1 == 0 else str(limit) for limit in (self.least, self.most))
        bounds = ""
        if math.isfinite(self.least) and math.isfinite(self.most):
            bounds = f" in {'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"
        elif math.isfinite(self.least):
            bounds = f" {'>' if self.above else '>='} {low}"
        elif math.isfinite(self.most):
            bounds = f" {'<' if self.below else '<='} {high}"
        return kind + bounds + "".join(f", or {choice}" for choice in self.choices)

    @property
    def example(self) -> float:
        lowest = self.least if math.isfinite(self.least) else min(self.most, 0)
        return (lowest if self.valid is None else self.valid) + 0


ANY_WHOLE = Range(whole=True)
WHOLE = Range(0, whole=True)
COUNT = Range(1, whole=True)
COUNT_OR_AUTO = COUNT._replace(choices=("auto",))
PRIOR = Range(0, 1, above=True, below=True, choices=("auto",), valid=0.01)
SEED = Range(0, 2**63 - 1, whole=True)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True, valid=1)
SHARE = Range(0, 1)
BELOW_ONE = Range(0, 1, below=True)
FROZEN = Range(-1, 4, whole=True)  # stages of the backbones that can be frozen

# (prefix, range, names): `name?` may be null, `name[]` may be a list of such numbers, `name[2]` is a list of two,
# `name[2]+` one or a list of such lists, `name*` may have another type, which is checked elsewhere; `name:value`
# applies if the key in `DECIDED_BY` has this value
TABLE: tuple[tuple[str, Range, str], ...] = (
    ("", SEED, "seed?"),
    ("", COUNT, "every num_queries resamples batch_size? image_size[2]"),
    ("", WHOLE, "images norm_batches"),
    ("", SHARE, "threshold?"),
    ("", Range(0, 1, above=True, below=True, valid=0.95), "level"),
    ("", Range(0, above=True, valid=0.01), "margin?"),
    ("", POSITIVE, "budget megabytes"),
    ("", NOT_NEGATIVE, "minutes?"),
    ("", COUNT, "resolution epochs?"),
    ("", SEED, "seeds[]"),
    ("sets.*.", Range(2, whole=True, valid=5), "folds?"),
    ("sets.*.", COUNT, "batch_size"),
    ("at.", COUNT, "layers? queries? image_size[2]?"),
    ("benchmark.", COUNT, "batch_sizes[] rounds"),
    ("pareto.", COUNT, "layers[]? queries[]? image_sizes[]? rounds search?"),
    ("pareto.", Range(2, whole=True, valid=300), "resamples"),
    ("export.", COUNT, "batch_size? images"),
    ("export.", NOT_NEGATIVE, "max_difference? max_map_drop?"),
    ("hydra.launcher.", Range(1, 1024, whole=True), "slots? threads?"),
    ("hydra.launcher.", COUNT, "save_seconds"),
    ("hydra.launcher.", POSITIVE, "num_cpus? interval"),
    ("hydra.launcher.", NOT_NEGATIVE, "num_gpus?"),
    ("hydra.launcher.", WHOLE, "retries"),
    ("hydra.sweeper.", COUNT, "n_trials min_epochs"),
    ("hydra.sweeper.", Range(0, 2**31 - 1, whole=True), "seed"),
    ("pareto.", Range(0, 2**31 - 1, whole=True), "seed"),
    ("hydra.sweeper.", WHOLE, "startup_trials"),
    ("hydra.sweeper.", Range(2, whole=True), "reduction_factor"),
    # data
    ("data.", WHOLE, "train* val* test* stop_epoch? keypoint_flip_pairs[]?"),
    ("data.phases.", WHOLE, "strong[]? mosaic[]? mixup[]? multi_scale[]?"),
    ("data.", Range(0, 1024, whole=True), "num_workers?"),
    ("data.", COUNT, "num_classes? multi_scale[]?* prefetch_factor? val_sample?"),
    ("data.", Range(1, 512, whole=True, valid=3), "channels"),
    ("data.", POSITIVE, "cache_gb keypoint_sigmas[]?"),
    ("data.", SHARE, "keep_empty"),
    ("data.", Range(0, 1, above=True, valid=0.001), "repeat_threshold?"),
    ("data.source.", Range(1, 8192, whole=True), "size"),
    ("data.source.", SEED, "seed"),
    ("data.augment.", SHARE, "photometric zoom_out iou_crop resize_crop flip vertical_flip mosaic mixup"),
    ("data.augment.", Range(1), "zoom_out_max least_side"),
    # losses and matching
    ("loss.", NOT_NEGATIVE, "weight_class weight_bbox weight_giou weight_mask_ce weight_mask_dice"),
    ("loss.", NOT_NEGATIVE, "weight_fgl weight_ddf"),
    ("loss.", NOT_NEGATIVE, "weight_teacher_class weight_teacher_bbox weight_teacher_giou weight_teacher_edges"),
    ("loss.", NOT_NEGATIVE, "weight_teacher_maps"),
    ("loss.", POSITIVE, "ddf_temperature"),
    ("loss.", NOT_NEGATIVE._replace(valid=1), "class_weights[]?*"),
    ("loss.", NOT_NEGATIVE, "weight_keypoint_l1 weight_keypoint_findable weight_keypoint_visible weight_keypoint_nll"),
    ("loss.", NOT_NEGATIVE, "weight_keypoint_distance weight_keypoint_oks"),
    ("loss.class_loss.", NOT_NEGATIVE, "gamma alpha"),
    ("loss.class_loss.alpha:detr_exp.loss.classification.", SHARE, "focal ia_bce"),
    ("loss.class_loss.", SHARE, "eos_coef"),
    ("loss.class_loss.", BELOW_ONE, "label_smoothing"),
    ("matcher.", NOT_NEGATIVE, "cost_class cost_bbox cost_giou gamma"),
    ("matcher.", SHARE, "alpha"),
    ("matcher.", WHOLE, "late_epoch"),
    ("matcher.", NOT_NEGATIVE, "late_power"),
    ("metric.", COUNT, "eval_max_dets"),
    # the network
    ("model.", COUNT, "image_size[2]+ hidden_dim num_layers num_heads num_cross_heads num_points[] dim_feedforward"),
    ("model.", COUNT, "num_queries num_groups"),
    ("model.", Range(4, whole=True, valid=32), "num_bins"),
    ("model.", PRIOR, "class_prior?"),
    ("model.", Range(2, 3, whole=True), "position_layers"),
    ("model.", ANY_WHOLE, "eval_idx"),
    ("model.", WHOLE, "num_denoising keypoint_counts[]? num_noise_labels"),
    ("model.", SHARE, "label_noise_ratio pixel_mean[3]?"),
    ("model.", BELOW_ONE, "dropout attention_dropout activation_dropout"),
    ("model.", NOT_NEGATIVE, "box_noise_scale score_alpha"),
    ("model.", POSITIVE, "offset_scale pixel_std[3]? edge_bound edge_scale"),
    ("model.mask_head.", COUNT, "downsample eval_blocks?"),
    ("model.neck.", COUNT, "num_bottlenecks hidden_dim num_heads dim_feedforward in_channels[]? feat_strides[]?"),
    ("model.neck.", WHOLE, "num_encoder_layers use_encoder_idx[]"),
    ("model.neck.", BELOW_ONE, "dropout"),
    ("model.neck.", POSITIVE, "pe_temperature expansion depth_mult"),
    ("model.backbone.", COUNT, "width num_heads patch_size num_windows out_blocks[] position_grid? out_strides[]"),
    ("model.backbone.", COUNT, "depth widths[] blocks[]?"),
    ("model.backbone.", COUNT, "details channels"),
    ("model.backbone.", WHOLE, "windowed[] taps[]"),
    ("model.backbone.body.", COUNT, "width num_heads depth ffn_ratio"),
    ("model.backbone.body.", WHOLE, "taps[]"),
    ("model.backbone.", BELOW_ONE, "drop_path"),
    ("model.backbone.", FROZEN, "freeze_at"),
    ("model.adapter.", COUNT, "rank"),
    ("model.adapter.", POSITIVE, "alpha"),
    ("model.adapter.", BELOW_ONE, "dropout"),
    # optimisers; those of torch share names
    ("optim.", Range(0, valid=1e-4), "lr lr_backbone? weight_decay"),
    ("optim.", NOT_NEGATIVE, "warmup"),
    ("optim.", SHARE._replace(advice="of steps: optim.warmup_unit=steps"), "warmup:fraction"),
    ("optim.param_groups.*.", NOT_NEGATIVE, "lr? lr_factor weight_decay?"),
    ("optim.param_groups.*.", Range(0, 1, above=True, valid=0.8), "layer_decay?"),
    ("optim.param_groups.*.", COUNT, "num_layers?"),
    ("optim.optimizer.", BELOW_ONE, "betas[2] momentum"),
    ("optim.optimizer.", NOT_NEGATIVE, "eps[]? lr_decay initial_accumulator_value lambd alpha t0 momentum_decay"),
    ("optim.optimizer.", SHARE, "rho dampening"),
    ("optim.optimizer.", Range(most=0, valid=-0.8), "beta2_decay"),
    ("optim.optimizer.", Range(1), "d"),
    ("optim.optimizer.", Range(1, 99, whole=True, valid=5), "ns_steps"),
    ("optim.optimizer.", POSITIVE, "etas[2] step_sizes[2]"),
    ("optim.scheduler.", SHARE, "min_factor"),
    ("optim.scheduler.", NOT_NEGATIVE, "flat_epochs? final_epochs milestones[] gamma drop_epoch factor"),
    ("teacher.", SHARE, "threshold"),
    ("teacher.", COUNT, "image_size[2]? out_strides[]"),
    ("teacher.", POSITIVE, "cache_gb"),
    # training
    ("trainer.", POSITIVE, "epochs"),
    ("trainer.", COUNT, "grad_accum_steps auto_batch_target_effective auto_batch_max_targets_per_image"),
    ("trainer.", COUNT, "ema_update_interval eval_interval checkpoint_interval log_every_steps"),
    ("trainer.", COUNT, "early_stopping_patience nonfinite_limit"),
    ("trainer.", COUNT, "restart_epoch? overfit_batches? max_steps? eval_batch_size? checkpoint_every_steps?"),
    ("trainer.", COUNT, "eval_every_steps?"),
    ("trainer.", COUNT_OR_AUTO, "batch_size"),
    ("trainer.", WHOLE, "keep_checkpoints skip_best_epochs num_pictures"),
    ("trainer.", NOT_NEGATIVE, "ema_tau early_stopping_min_delta clip_max_norm?"),
    ("trainer.", SHARE, "picture_threshold"),
    ("trainer.", BELOW_ONE, "smooth_alpha"),
    ("trainer.", BELOW_ONE._replace(valid=0.999), "ema_decay"),
    ("trainer.", Range(0, 1, above=True, valid=0.7), "auto_batch_ema_headroom"),
    ("trainer.elastic.", Range(0, 1, above=True, valid=1.0), "layers[] queries[] image_size[]"),
    ("trainer.elastic.", WHOLE, "num_random"),
    ("trainer.hardware.", Range(1, 1024, whole=True), "threads?"),
    ("trainer.hardware.", COUNT_OR_AUTO, "devices"),
    ("trainer.hardware.", Range(0, 604800, above=True, valid=300), "timeout"),
)
DECIDED_BY = {"loss.class_loss.alpha": "loss.class_loss._target_", "optim.warmup": "optim.warmup_unit"}


class Row(NamedTuple):
    """The allowed values of a key; see `TABLE`."""

    range: Range
    nullable: bool
    listed: bool
    length: int | None
    free: bool
    several: bool

    def __str__(self) -> str:
        many = f"a list of {self.length}, each " if self.length else ""
        return f"{many}{self.range}{', or several such lists' * self.several}{', or null' if self.nullable else ''}"

    def faults(self, value: object) -> Iterator[object]:
        """The numbers in `value` that are out of range, or `value` itself if its type or length is wrong."""
        items = value if isinstance(value, list) and self.listed else None
        if value is None:
            if not self.nullable:
                yield value
        elif self.several and isinstance(value, list) and any(isinstance(item, list) for item in value):
            for item in value:
                yield from self._replace(several=False).faults(item)
        elif self.length and (items is None or len(items) != self.length):
            yield value
        elif items is not None:
            one = self._replace(length=None, several=False, free=False)
            for item in items:
                yield from one.faults(item)
        elif not self.range.holds(value) and (not self.free or is_number(value)):
            yield value


def _rows() -> dict[str, Row]:
    rows, pattern = {}, r"([\w:]+)(\[(\d?)\])?(\+)?(\?)?(\*)?"
    for prefix, allowed, names in TABLE:
        between = "" if prefix.endswith(".") or not prefix else "."
        for name, listed, length, several, nullable, free in re.findall(pattern, names):
            many = int(length) if length else None
            rows[f"{prefix}{between}{name}"] = Row(
                allowed, bool(nullable), bool(listed), many, bool(free), bool(several)
            )
    return rows


ROWS = _rows()


def refuse_out_of_range(cfg: DictConfig) -> None:
    """Refuse numbers that are out of range.

    Args:
        cfg: a whole config without missing values, or some of its groups.

    Raises:
        ConfigError: with the key to override, its value, its range, and a valid override.
    """
    values = flat(values_of(cfg))
    written = flat(values_of(cfg, resolve=False))
    for key, value in values.items():
        row = row_of(key, values)
        if row is None or not _is_ours(key, values):
            continue
        for fault in row.faults(value):
            name = _set_by(key, written)
            found = "null" if fault is None else fault
            whole = f" (in {value})" if isinstance(value, list) and fault is not value else ""
            count = row.length or (max(1, len(value)) if isinstance(value, list) else None)
            valid = _as_text(row.range.example, count)
            advice = f"; {row.range.advice}" if row.range.advice else ""
            raise ConfigError(f"{name} is {found}{whole}; it must be {row}: {name}={valid}{advice}")


def row_of(key: str, values: Values) -> Row | None:
    """The row for a key, or None if it has no range."""
    named = re.sub(r"^(optim\.param_groups|sets)\.[^.]+\.", r"\1.*.", key)
    decided = ROWS.get(f"{named}:{values.get(DECIDED_BY[named])}") if named in DECIDED_BY else None
    return decided or ROWS.get(named)


def _is_ours(key: str, values: Values) -> bool:
    """Whether a key belongs to a part of this package or torch, by the nearest `_target_` above it."""
    parts = key.split(".")
    above = (values.get(".".join([*parts[:count], "_target_"])) for count in range(len(parts) - 1, 0, -1))
    return str(next(filter(None, above), OUR_TARGETS[0])).startswith(OUR_TARGETS)


def _set_by(key: str, written: Values) -> str:
    """The key that a user overrides: if the value of `key` is a reference, the referenced key."""
    while found := re.fullmatch(r"\$\{([\w.]+)\}", str(written.get(key))):
        key = found.group(1)
    return key


def _as_text(valid: float, count: int | None) -> str:
    return f"{valid:g}" if count is None else f"[{','.join([f'{valid:g}'] * count)}]"
