"""Two processes that talk by gloo, compared with one that does the same work. Slow are those that need the two."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import two_ranks

from detr_exp import build
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import distributed
from detr_exp.training import train_in

ACCUMULATED = "trainer.grad_accum_steps=2"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder that two ranks have filled, what each has found, printed and said at its end."""
    folder = tmp_path_factory.mktemp("pair")
    two_ranks.make_teacher(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for number in ("0", "1"):
        there = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, two_ranks.__file__, str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=os.environ | there, **pipes))
    said = [rank.communicate(timeout=1200) for rank in ranks]
    for number in (0, 1):
        assert (folder / f"rank{number}.pt").exists(), said[number][1][-4000:]
    found = [torch.load(folder / f"rank{number}.pt", weights_only=True) for number in (0, 1)]
    return folder, found, said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The step of one process over the same images."""
    folder = tmp_path_factory.mktemp("alone")

    def step(name, *words, **how):
        return two_ranks.one_step(*two_ranks.NETWORKS[name], *words, folder=folder, **how)

    return step


@pytest.fixture(scope="module")
def wanted_of(alone):
    """The step that two ranks have to take: of one process with accumulation, or with one batch."""

    def step(name, **how):
        if name in two_ranks.COUNTED:
            return alone(name, "trainer.batch_size=4", frozen_norms=True, **how)
        return alone(name, ACCUMULATED, **how)

    return step


def assert_same_step(found, wanted):
    scale = max(gradient.abs().max().item() for gradient in wanted["gradient"].values())
    assert scale > 1e-3
    torch.testing.assert_close(found["gradient"], wanted["gradient"], rtol=1e-5, atol=1e-5 * max(1.0, scale))
    assert found["terms"] == pytest.approx(wanted["terms"], rel=1e-4, abs=1e-5)


def assert_same_bits(found, wanted):
    for one, two in ((found, wanted), (found["optimizer"], wanted["optimizer"])):
        for part in ("model", "ema", "state"):
            if part in two:
                torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", two_ranks.NETWORKS)
def test_two_ranks_take_the_step_of_one_process(pair, wanted_of, name):
    """Accumulation has the same micro-batches and the same random draws, so norms may see them."""
    _, (first, second), _ = pair
    wanted = wanted_of(name)
    for found in (first[name], second[name]):
        assert_same_step(found, wanted)
        assert set(found["gradient"]) == set(wanted["gradient"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taught", "fsdp, taught"])
def test_two_ranks_with_a_teacher_take_the_step_of_one_process(pair, tmp_path, name):
    """The gradient of the projection is averaged, too."""
    _, (first, second), _ = pair
    two_ranks.make_teacher(tmp_path)
    wanted = two_ranks.one_step(*two_ranks.taught_words(tmp_path), ACCUMULATED, folder=tmp_path)
    assert wanted["gradient"]["projection.levels.0.weight"].norm() > 1e-3
    assert {"loss_teacher_maps", "loss_teacher_class"} <= wanted["terms"].keys()
    for found in (first[name], second[name]):
        assert_same_step(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elastic", "fsdp, elastic"])
def test_two_ranks_compute_the_same_member_and_wait_for_no_unused_parameter(pair, tmp_path, name):
    _, (first, second), _ = pair
    wanted = two_ranks.one_step(*two_ranks.ELASTIC, ACCUMULATED, folder=tmp_path)
    unused = [key for key, gradient in wanted["gradient"].items() if not gradient.any()]
    assert any(key.startswith("decoder.layers.1.") for key in unused)
    for found in (first[name], second[name]):
        assert_same_step(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distilled", "fsdp, distilled"])
def test_two_ranks_compute_the_same_members_and_the_largest_teaches_the_others(pair, tmp_path, name):
    """Several passes of a step, of which the last exchanges gradients."""
    _, (first, second), _ = pair
    wanted = two_ranks.one_step(*two_ranks.DISTILLED, ACCUMULATED, folder=tmp_path)
    assert wanted["terms"]["loss_teacher_class"] > 1e-3
    for found in (first[name], second[name]):
        assert_same_step(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", two_ranks.NETWORKS)
def test_a_rank_may_have_no_objects(pair, wanted_of, name):
    _, (first, _), _ = pair
    assert_same_step(first[f"{name}, one rank without objects"], wanted_of(name, emptied=1))


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one_large_batch(pair, alone):
    _, (first, _), _ = pair
    assert_same_step(first["frozen"], alone("boxes", "trainer.batch_size=4", frozen_norms=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", two_ranks.NETWORKS)
def test_a_shared_evaluation_is_that_of_one_process(pair, alone, name):
    """Five images on two ranks, one by one: no image twice, and every number the same to the last digit."""
    _, (first, second), _ = pair
    wanted = alone(name, ACCUMULATED)
    assert first[name]["evaluation"] == second[name]["evaluation"]
    losses = {key for key in wanted["evaluation"] if key.startswith("loss")}
    for key, value in wanted["evaluation"].items():
        if not (key in losses and name == "masks"):  # whose loss looks at random points
            assert first[name]["evaluation"][key] == (pytest.approx(value, rel=1e-5) if key in losses else value)
    assert wanted["evaluation"]["loss"] > 0
    assert first[name]["detections"].keys() == wanted["detections"].keys()
    assert len(wanted["detections"]) == 5
    for number, found in first[name]["detections"].items():
        assert torch.equal(found, wanted["detections"][number])
    assert len(second[name]["detections"]) == 2


@pytest.mark.slow
def test_a_step_that_is_bad_on_one_rank_is_left_out_by_all(pair):
    _, ranks, _ = pair
    for found in ranks:
        assert found["bad"]["skipped"] == 1
        assert not any(gradient.any() for gradient in found["bad"]["gradient"].values())


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_at_the_same_step_and_resume_repeats_the_run(pair):
    folder, ranks, _ = pair
    assert [found["ended by"] for found in ranks] == [15, 15]
    one, two = (files.load(folder / name / files.NEWEST) for name in ("undisturbed", "resumed"))
    assert one["step"] == 4
    assert one["world_size"] == 2
    assert_same_bits(two, one)


@pytest.mark.slow
def test_only_the_first_rank_prints(pair):
    folder, _, ((printed, _), (silent, _)) = pair
    assert "training RTDETRv2" in printed
    assert "x 2 ranks" in printed
    assert silent == ""
    log = (folder / "undisturbed" / "metrics.jsonl").read_text()
    assert len(re.findall('"train/loss":', log)) == 4


@pytest.mark.slow
def test_the_rank_that_failed_first_gives_the_reason(pair):
    """The other one says what happened there, not that its connection was closed."""
    _, _, ((_, first), (_, second)) = pair
    assert "ValueError: rank 1 has had enough" in second
    assert "PeerFailed: ValueError: rank 1 has had enough" in first


@pytest.mark.slow
def test_fsdp_takes_the_step_of_whole_tensors(pair, wanted_of):
    _, (first, second), _ = pair
    for name, network in (("fsdp", "boxes"), ("fsdp, masks", "masks"), ("fsdp, edges", "edges")):
        wanted = wanted_of(network)
        for found in (first[name], second[name]):
            assert_same_step(found, wanted)
            for key, value in wanted["evaluation"].items():
                if not key.startswith("loss"):
                    assert found["evaluation"][key] == pytest.approx(value, abs=1e-4)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_by_one_process(pair):
    """Whole, and with the weights that two unsharded ranks have come to."""
    folder, _, _ = pair
    sharded, plain = (files.load(folder / name / files.NEWEST) for name in ("sharded", "undisturbed"))
    assert list((folder / "sharded").glob("shards_*"))
    outline = files.load_without_shards(folder / "sharded" / files.NEWEST)
    assert all(outline["model"][name].is_meta for name in outline["ema"]["average"] if "running" not in name)
    assert sharded["model"].keys() == plain["model"].keys()
    for part in ("model", "ema"):
        torch.testing.assert_close(sharded[part], plain[part], rtol=1e-2, atol=2e-3)
    total = files.load(folder / "sharded" / files.BEST_TOTAL)
    assert total["kind"] == "inference"
    assert total["model"].keys() == plain["model"].keys()


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit(pair):
    """Also from checkpoints that a thread writes."""
    folder, _, _ = pair
    one, two = (files.load(folder / name / files.NEWEST) for name in ("sharded", "sharded_resumed"))
    assert_same_bits(two, one)
    assert len(list((folder / "sharded_resumed").glob("shards_*"))) == 1


@pytest.mark.slow
def test_damaged_parts_are_noticed(pair, tmp_path):
    folder, _, _ = pair
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (folder / "sharded").rglob("*"):
        if path.is_file() and (path.parent.name.startswith("shards_") or path.name == files.NEWEST):
            to = copy / path.relative_to(folder / "sharded")
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(path.read_bytes())
    (part,) = copy.glob("shards_*/*_0_0.distcp")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"0_0\.distcp is missing or damaged"):
        files.load(copy / files.NEWEST)


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_and_then_explained(pair, tmp_path, capsys):
    """Four steps of 8 images by two ranks; one process resumes with steps of 4, after the same images."""
    folder, _, _ = pair
    words = [*two_ranks.RUN, "trainer.epochs=3"]
    for name in ("undisturbed", "sharded"):
        home = tmp_path / name
        home.mkdir()
        for path in (folder / name).iterdir():
            if path.name == files.NEWEST or path.name.startswith("shards_"):
                os.symlink(path, home / path.name)
        resume = f"trainer.resume={home / files.NEWEST}"
        with pytest.raises(ValueError, match=r"2 rank\(s\) and this run has 1.*trainer\.resume_world_size=any"):
            train_in(tmp_path / f"{name}_refused", build.compose([*words, resume]))
        run = tmp_path / f"{name}_alone"
        any_ranks = "trainer.resume_world_size=any"
        train_in(run, build.compose([*words, resume, any_ranks]))
        said = capsys.readouterr().out
        assert "a step is 4 images instead of 8, an epoch 4 steps" in said


def test_one_process_gets_back_what_it_gave():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.on_first_rank(max, 3, 4) == 4
    assert distributed.gather("x") == ["x"]
    assert distributed.signal_of_any_rank(None) is None
    assert distributed.signal_of_any_rank(15) == 15
    assert distributed.gather_on_first_rank({3: "a"}) == [{3: "a"}]
    values = torch.ones(3)
    assert distributed.mean_over_ranks(values) is values


def test_wrong_hardware_settings(small):
    cases = {
        "trainer.hardware.devices=0": "number >= 1 or auto",
        "trainer.hardware.sync_bn=true": "CUDA only.*freeze_norm",
    }
    for word, told in cases.items():
        hardware = build.hardware(small(word, *(["trainer.hardware.devices=2"] if "sync" in word else [])))
        with pytest.raises(ValueError, match=told):
            _ = hardware.num_ranks
    for word, told in {"strategy=zero": "ddp or fsdp", "sync_bn=maybe": "true, false or auto"}.items():
        with pytest.raises(ValueError, match=told):
            build.trainer(small(f"trainer.hardware.{word}"))
    with pytest.raises(ValueError, match="torchrun has started 4 ranks"):
        build.hardware(small("trainer.hardware.devices=2")).refuse_ranks(4)
    assert build.hardware(small("trainer.hardware.devices=auto")).num_ranks >= 1
