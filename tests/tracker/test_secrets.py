import pytest

from detr_exp import report, train
from detr_exp.tracker.secrets import masked


def test_secrets_are_masked_wherever_they_stand():
    config = {
        "tracker": {"tracking_uri": "https://me:hunter2@host:5000/x?y=1"},
        "data": {"api_key": "k1", "apikey": "k2", "access_token": ["k3"], "root": "/data/tokens"},
        "credentials": {"user": "k4"},
        "loss": [{"db_password": "k5", "gamma": 2.0, "secret": None}],
        "note": "see http://host/a@b",
    }
    assert masked(config) == {
        "tracker": {"tracking_uri": "https://***@host:5000/x?y=1"},
        "data": {"api_key": "***", "apikey": "***", "access_token": ["***"], "root": "/data/tokens"},
        "credentials": {"user": "***"},
        "loss": [{"db_password": "***", "gamma": 2.0, "secret": None}],
        "note": "see http://host/a@b",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("optim.lr=1e-4", "optim.lr=1e-4"),
        ("data.api_key=k1", "data.api_key=***"),
        ("+data.extra={token: k2, b: 1}", "+data.extra={token: ***, b: 1}"),
        ("a=1,b.access_token=[k3,k4],c=2", "a=1,b.access_token=***,c=2"),
        ("data.secret='k 5' seed=1", "data.secret=*** seed=1"),
        ("tracker.tracking_uri=http://me:k6@host/x", "tracker.tracking_uri=http://***@host/x"),
        ("data.root=/data/tokens", "data.root=/data/tokens"),
        ("model.num_tokens=300", "model.num_tokens=300"),
        ("~data.token", "~data.token"),
    ],
)
def test_words_of_the_command_line(text, shown):
    assert masked(text) == shown


PARTS = """
from detr_exp.loss.classification import vfl

def loss(logits, labels, quality, *, num_classes, api_token):
    assert api_token.startswith("hunter2")
    return vfl(logits, labels, quality, num_classes=num_classes, alpha=0.75, gamma=2.0, label_smoothing=0.0)
"""
OPTION = """
defaults:
  - terms: detr
  - _self_
activation: sigmoid
class_loss:
  _target_: my_parts.loss
  _partial_: true
  api_token: hunter2-in-a-file
"""


@pytest.mark.parametrize("words", [["seed=5"], ["seed=6,7", "--multirun"]])
def test_a_planted_secret_is_in_no_file_store_or_page(command, tiny_run, tmp_path, monkeypatch, words):
    (tmp_path.parent / "code").mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(tmp_path.parent / "code")
    (tmp_path.parent / "code/my_parts.py").write_text(PARTS)
    (tmp_path.parent / "code/conf/loss").mkdir(parents=True, exist_ok=True)
    (tmp_path.parent / "code/conf/loss/mine.yaml").write_text(OPTION)
    usual = [word for word in tiny_run if not word.startswith(("tracker", "loss"))]
    mine = ["--config-dir", str(tmp_path.parent / "code/conf"), "loss=mine", "allow_targets=[my_parts]"]
    planted = [
        [],
        ["loss.class_loss.api_token=hunter2-as-a-word"],
        ["tracker.tracking_uri=http://me:hunter2@127.0.0.1:9"],
    ]
    for number, secret in enumerate(planted if len(words) == 1 else planted[1:2]):
        where = f"hydra.run.dir=run{number}" if len(words) == 1 else "hydra.sweep.dir=sweep"
        if number == 2:  # there is no such server
            monkeypatch.setattr("detr_exp.tracker.tracker.PATIENCE", 1.0)
        said = [words[0], *usual, "tracker.tensorboard=true", where, *secret]
        assert command(train.main, *words[1:], *mine, *said) == 0
    found = "run0,run1,run2" if len(words) == 1 else "sweep"
    assert command(report.main, f"runs=[{found}]", "hydra.run.dir=page") == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "run.json", "config.yaml", "checkpoint.pth", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
