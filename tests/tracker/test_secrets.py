import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_exp import report, train
from detr_exp.tracker.secrets import masked, names_secret


def test_secrets_are_masked_everywhere():
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
def test_overrides_of_the_command_line(text, shown):
    assert masked(text) == shown


PASSWORDS = st.text(st.characters(codec="ascii", exclude_categories=["C"], exclude_characters="\"'\\\\"), min_size=1)


@settings(max_examples=300, deadline=None)
@given(PASSWORDS, st.sampled_from(["postgresql", "mongodb+srv", "http", "s3", "redis"]))
def test_a_password_of_any_characters_is_masked_in_an_address(password, scheme):
    address = f"{scheme}://me:hunter2{password}hunter2@host:5000/db"
    assert "hunter2" not in masked(address)
    assert masked(address).endswith("@host:5000/db")
    assert "hunter2" not in masked(f"could not connect to {address}: refused")


@settings(max_examples=300, deadline=None)
@given(PASSWORDS)
def test_a_password_of_any_characters_is_masked_as_a_setting_in_json_and_in_python(password):
    secret = f"hunter2{password}hunter2"
    for text in (
        f"data.db_password={secret}",
        f"+tracker.apiKey={secret}",
        json.dumps({"a": 1, "token": secret, "b": [1]}),
        json.dumps({"payload": json.dumps({"X-Api-Key": secret})}),
        f"{ {'client_secret': secret} }",
    ):
        assert "hunter2" not in masked(text), text


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "passwd",
        "pwd",
        "passphrase",
        "db.PASSWORD",
        "dbPassword",
        "api_key",
        "api-key",
        "apikey",
        "ApiKey",
        "X-Api-Key",
        "token",
        "hf_token",
        "accessToken",
        "ACCESS_TOKEN",
        "token_2",
        "AWS_SECRET_ACCESS_KEY",
        "private_key",
        "AccountKey",
        "SharedAccessKey",
        "client_secret",
        "credential",
        "credentials.user",
        "Authorization",
        "Cookie",
        "wandb.api_key",
        "logger.wandb.key",
        "sas",
        "sig",
        "X-Amz-Signature",
        "jwt",
    ],
)
def test_spellings_of_a_secrets_key(key):
    assert names_secret(key)
    assert masked({key: "k1"}) == {key: "***"}
    assert "k1" not in masked(f"see {key}=k1, it is wrong")
    assert "k1" not in masked(f"{{'{key}': 'k1'}}")


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "token_dim",
        "num_tokens",
        "max_tokens",
        "cls_token",
        "mask_token",
        "keypoint_counts",
        "compass",
        "passthrough",
        "author",
        "monkey",
        "data.root",
        "num_register_tokens",
        "tokens_per_window",
        "design",
        "pattern",
        "keys",
        "key",
    ],
)
def test_keys_that_only_look_like_secrets(key):
    assert masked({key: "text"}) == {key: "text"}
    assert masked({key: 3}) == {key: 3}
    assert masked(f"{key}=text") == f"{key}=text"


def test_numbers_and_switches():
    assert masked({"password": 12345, "token": 3, "secret": None, "api_key": True}) == {
        "password": "***",
        "token": 3,
        "secret": None,
        "api_key": True,
    }


@pytest.mark.parametrize(
    ("text", "secrets"),
    [
        ("Authorization: Bearer k1.k1\nHost: a", ["k1"]),
        ("Authorization: AWS4-HMAC-SHA256 Credential=k1/2026, SignedHeaders=host, Signature=k2", ["k1", "k2"]),
        ("Cookie: a=k1; session=k2\nHost: a", ["k1", "k2"]),
        ("GET /x?token=k1&n=1&sig=k2%2F&se=3 failed", ["k1", "k2"]),
        ("Server=h;Password=k1;x=k1 no", ["k1;"]),
        ("DefaultEndpointsProtocol=https;AccountKey=k1==;EndpointSuffix=e", ["k1"]),
        ("API key: k1", ["k1"]),
        ("a.token=[k1,k2],b=1", ["k1", "k2"]),
        ("a.password=k1,k2,k3,b=1", ["k1", "k2", "k3"]),
        ("password = 'k1", ["k1"]),
        ("logged in with ghp_" + "k1" * 18, ["k1"]),
        ("https://k1@host/x and https://me:k2@host", ["k1", "k2"]),
        ("u://me:a://k1@host", ["k1"]),
        ("postgresql://me@host/x, https://k1@host/x and mysql://me:k2@host/x", ["k1", "k2"]),
        ('source postgresql://me:q^G$FJ%k1@k1@db-1.host.com/ca?sslmode=full: error parsing "x"', ["k1"]),
        ("mongosh mongodb+srv://svc:S3#k1/k1@cluster0.abc.net/?retryWrites=true", ["k1"]),
    ],
)
def test_secrets_in_headers_queries_and_sentences(text, secrets):
    assert not [secret for secret in secrets if secret in masked(text)], masked(text)


@pytest.mark.parametrize(
    "text",
    [
        "see http://host/a@b",
        "http://127.0.0.1:5000 cannot be reached; ask me@host",
        "sqlite:///outputs/mlflow.db",
        "tracker.tracking_uri=postgresql+psycopg://mlflow@database:5432/runs?sslmode=require",
        "mysql://me@database/runs",
        "s3://bucket/key:1",
        "12:30 epoch 3/4 loss=0.5",
        "unexpected token '<' in line 3: x",
        "C:\\data",
        "{a: 1, b: [2, 3]}",
    ],
)
def test_texts_without_a_secret_stay(text):
    assert masked(text) == text


def test_values_of_environment_variables_are_masked(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2/hunter2")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert masked("login failed for hunter2/hunter2 in short time") == "login failed for *** in short time"


PIECES = [
    "a",
    "a:",
    "://",
    "://a:",
    "token=",
    "token={",
    '"',
    "@",
    "key: ",
    "token=1,",
    " token:'",
    "x=y&",
    "\\\\",
    "[",
    "eyJ",
]


def test_masking_takes_time_linear_in_the_length():
    """Ten times the text in far less than a hundred times the time."""
    draw = random.Random(0)
    texts = [*PIECES, *("".join(draw.choices(PIECES, k=5)) for _ in range(10))]

    def seconds(text):
        started = time.process_time()
        masked(text)
        return time.process_time() - started

    for piece in texts:
        short, long = (piece * (length // len(piece)) for length in (2_000, 20_000))
        assert min(seconds(long) for _ in range(2)) < 40 * min(seconds(short) for _ in range(3)) + 0.05, piece


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
    """Overrides for a user-defined loss with a secret in its file."""
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


@pytest.mark.parametrize("secret", [[WORD], *(pytest.param(s, marks=pytest.mark.slow) for s in ([], [ADDRESS]))])
def test_a_planted_secret_is_in_no_file_store_or_page(command, tiny_run, own_loss, tmp_path, monkeypatch, secret):
    monkeypatch.setattr("detr_exp.tracker.tracker.PATIENCE", 1.0 if ADDRESS in secret else 300.0)
    usual = [word for word in tiny_run if not word.startswith(("tracker", "loss"))]
    assert command(train.main, *own_loss, *usual, *secret, "hydra.run.dir=run") == 0
    assert (tmp_path / "outputs/mlflow.db").exists() == (ADDRESS not in secret)
    assert_in_no_file(command, tmp_path, b"hunter2", "run")


@pytest.mark.slow
@pytest.mark.parametrize("secret", [[WORD], [f"{WORD},hunter2-as-another"], [WORD, ADDRESS]])
def test_a_planted_secret_is_in_no_file_of_a_sweep(command, tiny_run, own_loss, tmp_path, monkeypatch, capfd, secret):
    monkeypatch.setattr("detr_exp.tracker.tracker.PATIENCE", 1.0 if ADDRESS in secret else 300.0)
    usual = [word for word in tiny_run if not word.startswith(("tracker", "loss"))]
    assert command(train.main, "--multirun", *own_loss, *usual, *secret, "seed=6,7", "hydra.sweep.dir=sweep") == 0
    said = capfd.readouterr()
    assert "hunter2" not in said.out + said.err
    assert_in_no_file(command, tmp_path, b"hunter2", "sweep")
