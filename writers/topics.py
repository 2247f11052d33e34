"""A Kafka topic as a writer sees it: where it comes from, how it is read, and what each of the client's errors means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from lakehouse.errors import LakehouseError, Retryable, Terminal
from lakehouse.positions import Position
from lakehouse.services import kafka_config
from lakehouse.settings import Settings

TIMEOUT_SECONDS = 10.0

FORBIDDEN = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._AUTHENTICATION,
}
GONE = {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._LOG_TRUNCATION}
ABSENT = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}


def consumer_config(bootstrap: str, group: str, settings: Settings) -> dict[str, Any]:
    """What a consumer of a raw table is set to."""
    return {
        **kafka_config(settings, bootstrap),
        "group.id": group,
        "partition.assignment.strategy": "cooperative-sticky",  # who joins or leaves interrupts no other partition
        "session.timeout.ms": round(settings.ingest_session_seconds * 1000),
        "heartbeat.interval.ms": round(settings.ingest_session_seconds * 1000 / 5),
        "topic.metadata.refresh.interval.ms": round(settings.ingest_refresh_seconds * 1000),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        # the end of a partition is where a fetch finds nothing more: the embedded broker's watermarks are too low
        "enable.partition.eof": True,
        # librdkafka's default of 1000 ms stalls after every full queue
        "fetch.queue.backoff.ms": 5,
        # how long the broker holds a fetch at the end of a partition, which who drains waits for
        "fetch.wait.max.ms": 50,
        # what is fetched ahead: half a second at full speed; 64 MB took 45 MB more and were no faster
        "queued.max.messages.kbytes": 32_768,
    }


def describe(admin: AdminClient, bootstrap: str, topic: str) -> tuple[str, list[int]]:
    """(`cluster id/topic id`, partitions) of a topic, to notice a topic that was created again.

    Raises:
        Retryable: no broker answers. Terminal: there is no such topic.
    """
    try:
        found = admin.describe_topics(TopicCollection([topic]), request_timeout=TIMEOUT_SECONDS)[topic].result()
        cluster = admin.cluster_id(timeout=TIMEOUT_SECONDS)
    except KafkaException as error:
        if error.args[0].code() in ABSENT:
            raise Terminal(
                f"Kafka at {bootstrap} has no topic {topic!r}; create it, or set LAKEHOUSE_PRODUCT_TOPIC / _STRIPE_TOPIC"
            ) from None
        if error.args[0].code() in FORBIDDEN:
            raise Terminal(f"Kafka at {bootstrap} does not let this user see topic {topic!r}: {error.args[0].str()}") from None
        raise _no_answer(bootstrap, error) from None
    return f"{cluster}/{found.topic_id}", [p.id for p in found.partitions]


def _no_answer(bootstrap: str, error: KafkaException) -> Retryable:
    """To librdkafka's admin client a wrong password is a time-out like any other."""
    return Retryable(
        f"no Kafka broker answers at {bootstrap}: {error.args[0].str()}; is it up, and does it let in the user of "
        "LAKEHOUSE_KAFKA_USERNAME? See: lakehouse settings"
    )


def refuse_another(table: str, topic: str, known: Mapping[tuple[str, int], Position], source: str) -> None:
    """Raise Terminal if the positions of the topic were read from another one of that name."""
    for (t, p), position in known.items():
        if t == topic and position.source and position.source != source:
            raise Terminal(
                f"{table}: topic {topic!r} is not the one its positions came from ({position.source} then, {source} now, "
                f"partition {p} at offset {position.next_offset}): it was created again, or this is another cluster. "
                "Its offsets mean other records now: consume it under a new topic name. If this is a copy that kept the "
                f"offsets, take it over: lakehouse positions set {table}"
            )


def explained(error: KafkaError, table: str, topic: str, partition: int | None) -> LakehouseError | None:
    """What an error of the consumer means to a writer; None if the client goes on by itself."""
    where = f"{table}: {topic}" + ("" if partition is None or partition < 0 else f"[{partition}]")
    if error.code() in GONE:
        return Terminal(
            f"{where}: Kafka no longer has the offset that the table stands at ({error.str()}). Nothing was skipped: records "
            f"were lost before they were read, or the topic was created again. See: lakehouse positions show {table}"
        )
    if error.code() in ABSENT:
        return Terminal(f"{where}: the topic, or a partition of it, is no longer there ({error.str()})")
    if error.code() in FORBIDDEN:
        return Terminal(f"{where}: Kafka refuses access ({error.str()}); see: lakehouse settings")
    if error.code() == KafkaError._MAX_POLL_EXCEEDED:  # the group has gone on without us, and takes us in again
        return None
    if error.fatal():
        return Terminal(f"{where}: {error.str()}")
    return Retryable(f"reading {where}: {error.str()}")


def watermarks(settings: Settings, bootstrap: str, topic: str, partitions: list[int]) -> dict[int, tuple[int, int]]:
    """{partition: (first offset that Kafka still has, the offset after its last record)}.

    The embedded broker says too little of the second: see lakehouse/broker.py.

    Raises:
        Retryable: no broker answers.
    """
    admin = AdminClient(kafka_config(settings, bootstrap))
    ends = []
    try:
        for spec in (OffsetSpec.earliest(), OffsetSpec.latest()):  # type: ignore[no-untyped-call]
            asked = {TopicPartition(topic, p): spec for p in partitions}
            futures = admin.list_offsets(asked, request_timeout=TIMEOUT_SECONDS)
            ends.append({k.partition: f.result().offset for k, f in futures.items()})
    except KafkaException as error:
        raise _no_answer(bootstrap, error) from None
    return {p: (ends[0][p], ends[1][p]) for p in partitions}
