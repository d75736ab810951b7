"""A run small enough to be trained whole within seconds."""

import pytest

from detr_exp import build
from detr_exp.training import train_in

SMALL = [
    "data=shapes",
    "data.source.size=64",
    "data.train=8",
    "data.val=4",
    "data.test=4",
    "data.num_workers=0",
    "tracker=none",
    "model.image_size=[64,64]",
    "model.num_queries=20",
    "model.num_denoising=10",
    "model.num_layers=2",
    "model.hidden_dim=32",
    "model.num_heads=4",
    "model.dim_feedforward=32",
    "model.neck.hidden_dim=32",
    "model.neck.dim_feedforward=32",
    "model.backbone.widths=[8,16,24,32]",
    "trainer.epochs=2",
    "trainer.batch_size=2",
    "trainer.log_every_steps=1",
    "trainer.num_pictures=0",
    "trainer.hardware.amp=null",
    "trainer/hardware=cpu",
    "optim.lr=1e-3",
    "trainer.progress_bar=none",
]


@pytest.fixture
def small_words():
    """The overrides of the small run, for a separate process."""
    return tuple(SMALL)


@pytest.fixture(scope="session")
def small():
    """Overrides -> config of the small run; `model=` and `data=` replace all overrides of these groups."""

    def make(*words: str):
        chosen = tuple(group for group in ("model", "data") if any(word.startswith(f"{group}=") for word in words))
        return build.compose([*(word for word in SMALL if not word.startswith(chosen)), *words])

    return make


OTHERS = ("dfine_tiny", "deimv2_atto", "lwdetr_tiny", "ecseg_s", "ecpose_s")


@pytest.fixture(params=["rtdetrv2_tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def family(request):
    """Overrides of a small network of a family with the loss of its recipes."""
    return family_words(request.param)


@pytest.fixture
def words_of_family():
    """See `family_words`."""
    return family_words


def family_words(model: str) -> tuple[str, ...]:
    """Overrides of `model` as small as the usual one."""
    words = [word for word in SMALL if word.startswith("model.")]
    if model.startswith("deimv2"):
        words = [word for word in words if not word.startswith(("model.backbone", "model.neck.dim"))]
    if model.startswith("lwdetr"):
        words = [word for word in words if not word.startswith(("model.backbone", "model.neck", "model.num_denoising"))]
        words += ["model.backbone.width=24", "model.backbone.num_windows=2", "model.num_cross_heads=4"]
        words += ["model.neck.num_bottlenecks=1", "model.num_groups=2", "model.backbone.drop_path=0.3"]
    if model.startswith("ec"):
        words = [word for word in words if not word.startswith("model.backbone")]
        words += [f"model.backbone.body.{key}" for key in ("width=32", "num_heads=2", "depth=2", "taps=[0,1]")]
        words += ["model.backbone.channels=32", "matcher=pose"][: 1 + model.startswith("ecpose")]
    losses = {"dfine": "dfine", "deimv": "mal", "lwdet": "ia_bce", "ecseg": "deim", "ecpos": "pose"}
    return (f"model={model}", f"loss={losses.get(model[:5], 'vfl')}", *words)


@pytest.fixture
def fit(small, tmp_path):
    """Words -> the run folder of a finished training."""

    def run(*words: str, folder: str = "run"):
        train_in(tmp_path / folder, small(*words))
        return tmp_path / folder

    return run
