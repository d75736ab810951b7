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
