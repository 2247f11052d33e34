"""How a client of Kafka proves who it is: the one function that every client's settings come from."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import ValidationError

from lakehouse.services import kafka_config
from lakehouse.settings import Settings

PASSWORD = "correct horse"


def settings(**more: Any) -> Settings:
    return Settings(**({"kafka_bootstrap": "b:9096"} | more))


def test_plain_brokers_are_told_nothing() -> None:
    assert kafka_config(settings(), "b:9096") == {"bootstrap.servers": "b:9096", "log_level": 0}


def test_a_user_with_a_password() -> None:
    user = {"kafka_sasl_mechanism": "SCRAM-SHA-512", "kafka_username": "lake", "kafka_password": PASSWORD}
    held = settings(kafka_security_protocol="SASL_SSL", kafka_ca="/etc/ca.pem", **user)
    assert kafka_config(held, "b:9096") == {
        "bootstrap.servers": "b:9096",
        "log_level": 0,
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": "/etc/ca.pem",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "lake",
        "sasl.password": PASSWORD,
    }
    assert PASSWORD not in repr(held)
    assert "sasl.password" not in kafka_config(held, "127.0.0.1:5")  # the embedded broker is no place to send it to


def test_msk_iam_signs_with_the_credentials_of_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon's own signer, offline: a token is a presigned URL, and librdkafka wants its end in seconds."""
    pytest.importorskip("aws_msk_iam_sasl_signer", reason="the extra `aws` is not installed: make setup")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not a real key")
    config = kafka_config(
        settings(kafka_security_protocol="SASL_SSL", kafka_sasl_mechanism="AWS_MSK_IAM", s3_region="eu-west-1"), "b:9096"
    )
    assert config["sasl.mechanism"] == "OAUTHBEARER"
    token, expires = config["oauth_cb"]("")
    assert len(token) > 100
    assert time.time() < expires < time.time() + 3600


@pytest.mark.parametrize(
    ("half", "said"),
    [
        ({"kafka_security_protocol": "SASL_SSL"}, "LAKEHOUSE_KAFKA_SASL_MECHANISM: SASL_SSL needs one"),
        (
            {"kafka_security_protocol": "SASL_SSL", "kafka_sasl_mechanism": "PLAIN", "kafka_username": "lake"},
            "LAKEHOUSE_KAFKA_USERNAME: PLAIN needs it, and LAKEHOUSE_KAFKA_PASSWORD",
        ),
        (
            {"kafka_username": "lake", "kafka_password": PASSWORD},
            "LAKEHOUSE_KAFKA_SECURITY_PROTOCOL: must be SASL_SSL or SASL_PLAINTEXT",
        ),
    ],
)
def test_half_of_a_proof_is_a_wrong_setting(half: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(**half)
