import pytest

from detr_exp.tracker.secrets import masked, masked_word


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
    ("word", "shown"),
    [
        ("optim.lr=1e-4", "optim.lr=1e-4"),
        ("data.api_key=k1", "data.api_key=***"),
        ("+data.extra={token: k2}", "+data.extra=***"),
        ("tracker.tracking_uri=http://me:k3@host/x", "tracker.tracking_uri=http://***@host/x"),
        ("data.root=/data/tokens", "data.root=/data/tokens"),
        ("~data.token", "~data.token"),
    ],
)
def test_words_of_the_command_line(word, shown):
    assert masked_word(word) == shown
