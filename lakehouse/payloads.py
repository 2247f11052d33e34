"""The one way to read the payload of a raw row: bytes as received become text."""

from __future__ import annotations


def payload_text(column: str = "payload") -> str:
    """SQL: the payload as text; NULL for a tombstone and for bytes that are not UTF-8.

    Whatever is done to payloads at rest (encryption for each customer, so that erasure works under immutable raw) is undone here.
    """
    return f"try(decode({column}))"
