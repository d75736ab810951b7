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


@pytest.fixture
def own_loss(tmp_path_factory, monkeypatch):
    """Words for a loss of the user's own that is given a secret in its file."""
    code = tmp_path_factory.mktemp("code")
    (code / "my_parts.py").write_text(PARTS)
    (code / "conf/loss").mkdir(parents=True)
    (code / "conf/loss/mine.yaml").write_text(OPTION)
    monkeypatch.syspath_prepend(code)
    return ["--config-dir", str(code / "conf"), "loss=mine", "allow_targets=[my_parts]", "tracker.tensorboard=true"]


def assert_in_no_file(command, folder, word, found):
    assert command(report.main, f"runs={found}", "hydra.run.dir=page") == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "config.yaml", "checkpoint.pth", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if word in path.read_bytes()]


WORD = "loss.class_loss.api_token=hunter2-as-a-word"
ADDRESS = "tracker.tracking_uri=http://me:hunter2@127.0.0.1:9"


@pytest.mark.parametrize("secret", [[WORD], pytest.param([], marks=pytest.mark.slow), [ADDRESS]])
def test_a_planted_secret_is_in_no_file_store_or_page(command, tiny_run, own_loss, tmp_path, monkeypatch, secret):
    monkeypatch.setattr("detr_exp.tracker.tracker.PATIENCE", 1.0 if ADDRESS in secret else 300.0)
    usual = [word for word in tiny_run if not word.startswith(("tracker", "loss"))]
    assert command(train.main, *own_loss, *usual, *secret, "hydra.run.dir=run") == 0
    assert (tmp_path / "outputs/mlflow.db").exists() == (ADDRESS not in secret)
    assert_in_no_file(command, tmp_path, b"hunter2", "run")


@pytest.mark.slow
def test_a_planted_secret_is_in_no_file_of_a_sweep(command, tiny_run, own_loss, tmp_path):
    usual = [word for word in tiny_run if not word.startswith(("tracker", "loss"))]
    assert command(train.main, "--multirun", *own_loss, *usual, WORD, "seed=6,7", "hydra.sweep.dir=sweep") == 0
    assert_in_no_file(command, tmp_path, b"hunter2", "sweep")
