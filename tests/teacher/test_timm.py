"""A backbone of timm as the teacher."""

import re

import pytest
import timm
import torch

from detr_exp import build

TINY = ("model.hidden_dim=32", "model.neck.hidden_dim=32", "model.backbone.widths=[8,16,24,32]", "model.num_heads=4")


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_its_maps_teach_the_encoder_at_the_nearest_stride(tiny_run, file, tmp_path, capsys):
    words = ["teacher=timm", "teacher.name=test_resnet", f"teacher.pretrained={file}", "teacher.out_strides=[8,16]"]
    cfg = build.compose([*tiny_run, *TINY, *words, "teacher.image_size=[96,96]"])
    run, trainer = build.run(cfg, tmp_path), build.trainer(cfg)
    assert run.teaching.levels == [0, 1, 1]
    assert run.teaching.columns == []
    state = trainer.start(run)
    said = capsys.readouterr().out
    assert re.search(r"network +([\d,]+) parameters \(\1 trained\)", said)
    assert re.search(r"teacher .*, [\d,]+ parameters between both encoders are trained", said)
    before = [p.detach().clone() for p in run.teaching.parameters]
    state.network.train()
    state.loader.batch_sampler.set_epoch(0)
    terms, _ = trainer.train_step(run, state, [next(iter(state.loader))])
    named = dict(zip(state.term_names, terms.tolist()))
    assert 0 < named["loss_teacher_maps"] < 2 * cfg.loss.weight_teacher_maps
    assert not [name for name in named if "teacher" in name and "maps" not in name]
    assert all((old != new).any() for old, new in zip(before, run.teaching.parameters))
    assert not run.teaching.teacher.backbone.training


def test_random_weights_and_predictions_are_refused(tiny_run, file, tmp_path):
    words = [*tiny_run, *TINY, "teacher=timm", "teacher.name=test_resnet"]
    with pytest.raises(ValueError, match=r"teacher\.pretrained=true"):
        build.run(build.compose([*words, "teacher.pretrained=false"]), tmp_path)
    words += [f"teacher.pretrained={file}", "teacher.out_strides=[8,16]", "loss/teacher=detr"]
    with pytest.raises(ValueError, match=r"detects nothing.*loss/teacher=maps"):
        build.run(build.compose(words), tmp_path)
