"""Whose webhook is it: the signature check, against an independent vector, its edges, and the `stripe` library."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from lakehouse.errors import UsageError
from writers.webhook_records import Record, make_record, record_key
from writers.webhook_signature import BadSignature, verify_signature
from writers.webhooks import create_app

# printf '1700000000.{"id":"evt_1","object":"event"}' | openssl dgst -sha256 -hmac whsec_golden
GOLDEN_BODY = b'{"id":"evt_1","object":"event"}'
GOLDEN_V1 = "9d1db3bb0526a5e32bea486aaba18eebc76a8682f843b49c08d460258611e8d5"
NOW = 1_700_000_000
SECRET = SecretStr("whsec_golden")
OTHER = SecretStr("whsec_other")


def sign(body: bytes, secret: SecretStr = SECRET, at: int = NOW) -> str:
    return hmac.new(secret.get_secret_value().encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()


def reason(header: str, body: bytes = GOLDEN_BODY, now: float = NOW, secrets: tuple[SecretStr, ...] = (SECRET,)) -> str:
    """Why it is refused; "" when it is accepted."""
    try:
        verify_signature(header, body, secrets, now, 300)
    except BadSignature as bad:
        return bad.reason
    return ""


def test_golden_vector() -> None:
    assert reason(f"t={NOW},v1={GOLDEN_V1}") == ""
    assert sign(GOLDEN_BODY) == GOLDEN_V1


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (NOW + 300, ""),
        (NOW + 300.001, "stale"),
        (NOW + 301, "stale"),
        (NOW - 300, ""),
        (NOW - 300.001, "future"),
        (NOW - 301, "future"),
        (NOW + 10**9, "stale"),
    ],
)
def test_the_tolerance_is_inclusive_and_holds_both_ways(now: float, why: str) -> None:
    assert reason(f"t={NOW},v1={GOLDEN_V1}", now=now) == why


def test_a_forged_old_request_is_a_mismatch_not_stale() -> None:
    assert reason(f"t={NOW},v1={'0' * 64}", now=NOW + 10_000) == "mismatch"


def test_every_active_secret_counts_while_one_is_rolled() -> None:
    old, new = sign(GOLDEN_BODY, SECRET), sign(GOLDEN_BODY, OTHER)
    for secrets in ((SECRET, OTHER), (OTHER, SECRET)):
        assert reason(f"t={NOW},v1={old}", secrets=secrets) == ""
        assert reason(f"t={NOW},v1={new}", secrets=secrets) == ""
    assert reason(f"t={NOW},v1={old}", secrets=(OTHER,)) == "mismatch"
    assert reason(f"t={NOW},v1={old}", secrets=()) == "mismatch"


def test_any_of_several_v1_signatures_may_match() -> None:
    wrong = "f" * 64
    assert reason(f"t={NOW},v1={wrong},v1={GOLDEN_V1}") == ""
    assert reason(f"t={NOW},v1={GOLDEN_V1},v1={wrong},v0={wrong}") == ""
    assert reason(f"v1={GOLDEN_V1},t={NOW}") == ""  # the order is not promised
    assert reason(f"t={NOW}, v1={GOLDEN_V1}") == ""  # as a proxy may re-join it
    assert reason(f"t={NOW},v1={wrong},v1={wrong}") == "mismatch"


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("", "missing"),
        (f"t={NOW}", "no_v1"),
        (f"t={NOW},v0={GOLDEN_V1}", "no_v1"),  # Stripe's test scheme: never accepted, so nobody can downgrade
        (f"t={NOW},V1={GOLDEN_V1}", "no_v1"),
        (f"t={NOW},v1=", "mismatch"),
        (f"t={NOW},v1", "mismatch"),
        (f"t={NOW},v1={GOLDEN_V1[:-1]}", "mismatch"),
        (f"t={NOW},v1={GOLDEN_V1[:32]}", "mismatch"),
        (f"t={NOW},v1={GOLDEN_V1}0", "mismatch"),
        (f"t={NOW},v1={GOLDEN_V1.upper()}", "mismatch"),
        (f"t={NOW},v1=é{GOLDEN_V1[1:]}", "mismatch"),
        (f"t={NOW},v1=\ud800", "mismatch"),
        (f"t={NOW + 1},v1={GOLDEN_V1}", "mismatch"),
        (f"v1={GOLDEN_V1}", "malformed"),
        (f"t=,v1={GOLDEN_V1}", "malformed"),
        (f"t=-{NOW},v1={GOLDEN_V1}", "malformed"),
        (f"t=1_700_000_000,v1={GOLDEN_V1}", "malformed"),
        (f"t={NOW}.0,v1={GOLDEN_V1}", "malformed"),
        (f"t=١٧٠٠٠٠٠٠٠٠,v1={GOLDEN_V1}", "malformed"),
        (f"t={'9' * 5000},v1={GOLDEN_V1}", "malformed"),
        (f"t={NOW},t={NOW - 5},v1={GOLDEN_V1}", "malformed"),
        ("garbage", "malformed"),
        (",,,=,=", "malformed"),
    ],
)
def test_refused_headers(header: str, why: str) -> None:
    assert reason(header) == why


def test_a_blank_secret_lets_nobody_in() -> None:
    for blank in (SecretStr(""), SecretStr(" \n")):
        header = f"t={NOW},v1={sign(GOLDEN_BODY, blank)}"
        assert reason(header, secrets=(blank,)) == "mismatch"
        for secrets in ([], [SECRET, blank]):
            with pytest.raises(UsageError, match="LAKEHOUSE_WEBHOOK_SECRETS"):
                create_app(produce=_Nowhere(), secrets=secrets)


@given(body=st.binary(min_size=1, max_size=300), position=st.integers(min_value=0), flip=st.integers(1, 255))
def test_any_changed_byte_is_refused(body: bytes, position: int, flip: int) -> None:
    header = f"t={NOW},v1={sign(body)}"
    assert reason(header, body) == ""
    changed = bytearray(body)
    changed[position % len(body)] ^= flip
    assert reason(header, bytes(changed)) == "mismatch"


@given(body=st.binary(max_size=100), extra=st.binary(min_size=1, max_size=3))
def test_a_longer_or_shorter_body_is_refused(body: bytes, extra: bytes) -> None:
    assert reason(f"t={NOW},v1={sign(body)}", body + extra) == "mismatch"
    assert reason(f"t={NOW},v1={sign(body + extra)}", body) == "mismatch"


@given(header=st.text(max_size=200))
def test_no_header_crashes_it(header: str) -> None:
    assert reason(header) in {"missing", "malformed", "no_v1", "mismatch"}


@given(
    body=st.text(st.characters(codec="utf-8"), max_size=200),
    age=st.integers(0, 600),
    forged=st.booleans(),
    scheme=st.sampled_from(["v1", "v0"]),
)
def test_agrees_with_the_stripe_library(body: str, age: int, forged: bool, scheme: str) -> None:
    """For one secret, UTF-8 and no future time, which is all the library checks, both say the same."""
    sent = NOW - age
    header = stripe.WebhookSignature.generate_signature_header(body, "whsec_x" if forged else "whsec_golden", sent)
    header = header.replace("v1=", f"{scheme}=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stripe._webhook.time.time", lambda: float(NOW))
        try:
            stripe.WebhookSignature.verify_header(body, header, "whsec_golden", 300)
            library = True
        except stripe.SignatureVerificationError:
            library = False
    assert (reason(header, body.encode()) == "") is library


@pytest.mark.parametrize(
    ("event", "key"),
    [
        ({"id": "evt_1", "data": {"object": {"id": "sub_1"}}}, b"platform:sub_1"),
        ({"id": "evt_1", "account": "acct_1", "data": {"object": {"id": "sub_1"}}}, b"acct_1:sub_1"),
        ({"id": "evt_1", "account": None, "data": {"object": {"object": "invoice"}}}, b"platform:evt_1"),  # upcoming
        ({"id": "evt_1", "object": "v2.core.event", "related_object": {"id": "x"}}, b"platform:evt_1"),
        ({"id": "evt_1", "data": {"object": {"id": 5}}}, b"platform:evt_1"),
        ({"id": "evt_1", "data": {"object": {"id": ""}}}, b"platform:evt_1"),
        ({"id": "evt_1", "data": [1]}, b"platform:evt_1"),
        ({"id": "evt_1", "data": {"object": "sub_1"}}, b"platform:evt_1"),
        ({"id": "evt_1", "data": None, "account": 7}, b"platform:evt_1"),
        ({}, b"platform:unknown"),
        ({"id": "e" * 2000}, b"platform:" + b"e" * 503),
        ({"id": "evt_é"}, "platform:evt_é".encode()),
    ],
)
def test_the_key_keeps_one_object_together(event: dict[str, Any], key: bytes) -> None:
    assert record_key(json.dumps(event, ensure_ascii=False).encode()) == key
    assert record_key(json.dumps(event, indent=2).encode()) == key


DEEP = 200_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b'["evt_1", "acct_1"]',
        b"{",
        b"{} {}",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"a":NaN}',
        b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"data":' + b'{"object":' * DEEP + b"1" + b"}" * DEEP + b"}",
        b'{"data":{"object":{"id":' + b"[" * DEEP,
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_not_a_json_object_is_refused_without_a_crash(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a JSON object$"):
        record_key(body)


@given(body=st.binary(max_size=60) | st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_no_body_crashes_it(body: bytes) -> None:
    refusal = None
    try:
        record_key(b'{"id":' + body + b"}")
    except ValueError as error:  # UnicodeDecodeError would be one too
        refusal = str(error)
    assert refusal in {None, "not a JSON object"}


def test_the_record_carries_the_exact_bytes_and_the_instant() -> None:
    body = b'{ "id":"evt_1",\n"account":null }'
    assert make_record(body, 1_700_000_000.123456) == Record(
        key=b"platform:evt_1",
        value=body,
        timestamp_ms=1_700_000_000_123,
        headers=[("received_at", b"2023-11-14T22:13:20.123456Z"), ("source", b"webhook")],
    )
    assert make_record(body, 1_700_000_000.0).headers[0][1] == b"2023-11-14T22:13:20.000000Z"


class _Nowhere:
    async def __call__(self, record: Record) -> None:
        raise NotImplementedError

    async def reachable(self) -> bool:
        return False
