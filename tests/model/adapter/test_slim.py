"""Runs with an adapter: what their checkpoints hold, how they go on, and what they make with their base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.deploy.export import export_in
from detr_exp.export_weights import write_safetensors
from detr_exp.inference.detector import load
from detr_exp.model.adapter.lora import LoRA
from detr_exp.model.adapter.slim import merge, own_state, undetermined_by
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in

KNOWN = ["arrow", "kite", "house"]  # of the six shapes; the base calls the others something else
EXACT = ("trainer.deterministic=true", "trainer.num_pictures=0", "trainer.evaluate_weights=both")


@pytest.fixture(scope="module", params=["rtdetrv2_tiny", pytest.param("dfine_tiny", marks=pytest.mark.slow)])
def tiny_run(request: pytest.FixtureRequest, tiny_run: list[str]) -> list[str]:
    """Overrides for a training of a second, of each family."""
    return [f"model={request.param}", *tiny_run[1:]] + ["loss=dfine"] * request.param.startswith("dfine")


@pytest.fixture(scope="module")
def trained(trained: Path, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run."""
    if tiny_run[0] == "model=rtdetrv2_tiny":
        return trained
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, compose(tiny_run))
    return folder


@pytest.fixture(scope="module")
def base(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows half of the classes."""
    state = files.load(trained / files.BEST_TOTAL)
    state["classes"] = [name if name in KNOWN else f"no {name}" for name in state["classes"]]
    path = tmp_path_factory.mktemp("base") / "base.pth"
    files.save(state, path)
    return path


def with_adapter(tiny_run: list[str], base: Path) -> list[str]:
    return [*tiny_run, *EXACT, f"model.weights={base}", "model/adapter=lora", "model.adapter.rank=2", "optim.lr=0.01"]


@pytest.fixture(scope="module")
def adapted(base: Path, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with an adapter."""
    folder = tmp_path_factory.mktemp("adapted")
    train_in(folder, compose(with_adapter(tiny_run, base)))
    return folder


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(images()).pred.logits


def is_by_class(name: str) -> bool:
    return "score_head" in name or "class_embed" in name


def test_a_network_begins_as_its_base_to_the_bit(tiny_run: list[str], base: Path) -> None:
    overrides = with_adapter(tiny_run, base)
    plain = [
        override
        for override in overrides
        if not override.startswith("model/adapter") and "model.adapter" not in override
    ]
    torch.manual_seed(1)
    before = build.network(compose(plain))
    torch.manual_seed(1)
    after = build.network(compose(overrides))
    assert torch.equal(logits(after), logits(before))
    own = {name for name, parameter in after.named_parameters() if parameter.requires_grad}
    assert all("lora" in name or is_by_class(name) for name in own)
    assert any(is_by_class(name) for name in own)


def test_checkpoints_hold_what_was_trained_and_name_their_base(adapted: Path, base: Path) -> None:
    whole = files.load(base)["model"]
    buffers = {name for name, _ in load(adapted).network.named_buffers()}
    for path in [*(adapted / name for name in files.BEST.values()), adapted / files.NEWEST, adapted / files.BEST_TOTAL]:
        state = files.load(path)
        assert Path(state["base"]["path"]) == base.resolve()
        kept = {name for name in state["model"] if "lora" not in name}
        assert {name for name in kept if name not in whole} == set()
        assert all(is_by_class(name) or name in buffers for name in kept)
        assert path.stat().st_size < 0.1 * base.stat().st_size
    training = files.load(adapted / files.NEWEST)
    assert set(training["ema"]["average"]) <= set(training["model"])
    assert len(training["optimizer"]["state"]) == len(training["model"].keys() - buffers)


def test_what_is_opened_is_the_base_with_the_adapter_merged(adapted: Path, base: Path) -> None:
    raw = load(adapted, weights="raw").network
    theirs, state = files.load(base)["model"], files.load(adapted / files.BEST["raw"])["model"]
    assert set(raw.state_dict()) == set(theirs)
    for name, tensor in raw.state_dict().items():
        place, _, kind = name.rpartition(".")
        lora_A = state.get(f"{place}.parametrizations.{kind}.0.lora_A")
        if lora_A is not None:
            change = 16 / 2 * state[f"{place}.parametrizations.{kind}.0.lora_B"] @ lora_A
            assert change.abs().max() > 0
            torch.testing.assert_close(tensor, theirs[name] + change, rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, state.get(name, theirs[name])), name
    assert not torch.equal(logits(load(adapted, weights="ema").network), logits(raw))


def test_evaluation_repeats_the_metrics_of_the_training(adapted: Path, tiny_run: list[str], base: Path) -> None:
    """The merged network computes the very bits of the adapted one."""
    unmerged = build.network(compose(with_adapter(tiny_run, base)), load_data(tiny_run))
    unmerged.load_state_dict(files.load(adapted / files.BEST["ema"])["model"], strict=False)
    opened = load(adapted, weights="ema")
    assert torch.equal(logits(opened.network), logits(unmerged))
    deployed = logits(unmerged.deploy())
    torch.testing.assert_close(deployed, logits(opened.network), rtol=0, atol=1e-4)
    torch.testing.assert_close(deployed, logits(opened.folded().network), rtol=0, atol=0)


def load_data(tiny_run: list[str]):
    return build.data(compose(tiny_run))


def test_a_run_that_was_killed_ends_with_the_same_bits(
    adapted: Path, tiny_run: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = with_adapter(tiny_run, base)
    original = Trainer.train_step

    def die(trainer, run, state, window):
        if state.step == 1:
            raise KeyboardInterrupt
        return original(trainer, run, state, window)

    cfg = compose([*overrides, "trainer.checkpoint_every_steps=1", "trainer.resume=auto"])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            train_in(tmp_path / "run", cfg)
    train_in(tmp_path / "run", cfg)
    once, again = (files.load(folder / files.NEWEST) for folder in (adapted, tmp_path / "run"))
    assert again["step"] == 2
    for part in ("model", "ema", "optimizer"):
        assert_same(once[part], again[part])


def assert_same(once, again) -> None:
    if isinstance(once, dict):
        assert once.keys() == again.keys()
        for key in once:
            assert_same(once[key], again[key])
    elif isinstance(once, torch.Tensor):
        assert torch.equal(once, again)


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    """The base with one number changed."""
    state = files.load(base)
    state["model"]["decoder.enc_output.proj.bias"][0] += 1
    files.save(state, tmp_path / "other.pth")
    return tmp_path / "other.pth"


def moved(adapted: Path, base: Path, folder: Path) -> Path:
    """A copy of the run whose checkpoints name a base in `folder`."""
    shutil.copytree(adapted, folder / "run")
    for path in (folder / "run").glob("*.pth"):
        state = files.load(path)
        state["base"]["path"] = str(folder / "base.pth")
        files.save(state, path)
    return folder / "run"


def test_another_base_or_none_is_refused(adapted: Path, base: Path, other: Path, tmp_path: Path) -> None:
    run = moved(adapted, base, tmp_path)
    with pytest.raises(ValueError, match=r"adapter for the base .*base\.pth does not exist; put that base there"):
        load(run)
    shutil.copy(other, tmp_path / "base.pth")
    with pytest.raises(ValueError, match=r"base\.pth is another file; put that base there"):
        load(run)
    shutil.copy(base, run / "any name.pth")  # beside the checkpoint: runs call theirs by the same names
    assert torch.equal(logits(load(run).network), logits(load(adapted).network))


def test_resuming_with_another_base_is_refused(
    tiny_run: list[str], adapted: Path, base: Path, other: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(adapted, tmp_path / "run")
    content = base.read_bytes()
    try:
        shutil.copy(other, base)
        with pytest.raises(ValueError, match=r"an adapter for the base .* is another (one|file).*restore that base"):
            train_in(run, compose([*with_adapter(tiny_run, base), "trainer.resume=auto", "trainer.epochs=2"]))
    finally:
        base.write_bytes(content)


def test_resuming_with_an_adapter_where_there_was_none_is_refused(
    tiny_run: list[str], trained: Path, base: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    overrides = [*with_adapter(tiny_run, base), f"trainer.resume={run}", "trainer.epochs=2"]
    state = files.load(run / files.NEWEST)
    state["config"]["model"]["weights"] = str(base)
    files.save(state, run / files.NEWEST)
    with pytest.raises(ValueError, match=r"was trained without an adapter.*model/adapter=none, or start a new run"):
        train_in(run, compose(overrides))


@pytest.mark.parametrize("override", ["model.adapter=lora", "model.adapter=null"])
def test_it_is_chosen_with_a_slash(override: str) -> None:
    with pytest.raises(ValueError, match=r"options are chosen with a slash: model/adapter=\.\.\. \(.*lora"):
        compose(["model=rtdetrv2_tiny", override])


def test_none_is_no_key(tiny_run: list[str]) -> None:
    """So that runs with and without the override are the same run."""
    assert compose([*tiny_run, "model/adapter=none"]) == compose(tiny_run)


def test_an_adapter_needs_weights(tiny_run: list[str]) -> None:
    with pytest.raises(ValueError, match=r"model\.weights=<file>, or .*model/adapter=none"):
        build.network(compose([*tiny_run, "model/adapter=lora"]))


def test_both_in_one_file(adapted: Path, tiny_run: list[str], tmp_path: Path) -> None:
    """An adapter alone begins no run; merged into a file it does, and that file is opened by itself."""
    slim = adapted / files.BEST_TOTAL
    with pytest.raises(ValueError, match=r"holds an adapter .*format=safetensors"):
        build.network(compose([*tiny_run, f"model.weights={slim}"]))
    whole = write_safetensors(tmp_path, slim)
    opened = logits(load(adapted).network)
    assert torch.equal(logits(load(whole).network), opened)
    again = build.network(compose([*tiny_run, f"model.weights={whole}", "model/adapter=lora"]))
    assert torch.equal(logits(again), opened)
    assert not any(p.requires_grad for name, p in again.named_parameters() if is_by_class(name) and "lora" not in name)


def test_export_knows_nothing_of_adapters(adapted: Path, tmp_path: Path) -> None:
    given = [f"checkpoint={adapted}", "trainer/hardware=cpu", "export.images=2", "format=torchscript"]
    path = export_in(tmp_path, compose(given, config_name="export"))
    actual = torch.jit.load(path)
    assert not [name for name, _ in actual.named_parameters() if "lora" in name]


def test_an_adapter_of_rf_detr_nano_is_a_twentieth_of_it() -> None:
    network = build.network(compose(["model=rfdetr", "data.num_classes=20"]))
    base = sum(tensor.nbytes for tensor in network.state_dict().values())
    adapter = LoRA(rank=8, alpha=16, dropout=0.0, target_modules=None, modules_to_save=None)
    adapter.adapt(network, network.class_tensors())
    own = own_state(network)
    assert network.class_tensors().keys() <= own.keys()
    apart = sum(tensor.nbytes for name, tensor in own.items() if name not in network.class_tensors())
    assert 0.02 < apart / base < 0.05


def test_what_weights_do_not_determine_keeps_its_values() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def some() -> None:
        with torch.no_grad():
            network[0].weight.fill_(1.0)
            network[1].weight[:1] = 1.0

    assert undetermined_by(some, network)[0] == {"0.bias", "1.weight", "1.bias"}
    assert torch.equal(network[0].weight, torch.ones(3, 2))
    assert torch.equal(network[1].weight[0], torch.ones(3))
    assert torch.equal(network[1].weight[1], before["1.weight"][1])
    assert torch.equal(network[0].bias, before["0.bias"])


def test_merging_twice_changes_nothing(tiny_run: list[str], base: Path) -> None:
    network = merge(build.network(compose(with_adapter(tiny_run, base))))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert_same(before, merge(network).state_dict())
