"""One node of real Apache Kafka (KRaft, broker and controller in one) on loopback: `make kafka`, integration tests, benchmarks.

Its jars are pinned in `kafka.pom.xml` and copied once with Maven into a cache folder. Where there is no Java, or Maven reaches
no repository, `why_unavailable()` says so and with which command that changes; nothing else needs Kafka itself.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from xml.etree import ElementTree as ET

from confluent_kafka import Consumer, KafkaException, TopicPartition

from lakehouse.broker import admin_client
from lakehouse.errors import LakehouseError, Retryable, UsageError
from lakehouse.processes import HOST, LOG_TAIL_BYTES, Child, accepts, free_ports, require_free

POM = Path(__file__).with_name("kafka.pom.xml")
VERSION = str(ET.parse(POM).findtext("{*}version"))  # noqa: S314 - a file of this package
START_TIMEOUT_SECONDS = 60.0  # two seconds on an idle machine
STOP_TIMEOUT_SECONDS = 15.0
COORDINATOR_SECONDS = 8.0
FETCH_TIMEOUT_SECONDS = 300.0

# What differs from Kafka's defaults, and why.
PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    # one node holds every replica
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    # as MSK is run: a misspelt topic is an error, not a new topic
    "auto.create.topics.enable": "false",
    # a group begins at once, and a test may ask for a short session
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    # a killed node is let in again after this long, instead of 9 s
    "broker.session.timeout.ms": "1500",
    "broker.heartbeat.interval.ms": "300",
    # records of a simulated past are not old; only who started the node removes them
    "log.retention.ms": "-1",
    "log.segment.delete.delay.ms": "1000",
    # 1 MB payloads and more, in batches
    "message.max.bytes": "8388608",
    # the default takes 128 MB of the heap
    "log.cleaner.dedupe.buffer.size": "4194304",
}


def cache_dir() -> Path:
    """Where the jars of this version are kept, shared by all checkouts of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "streamforge" / f"kafka-{VERSION}"


def why_unavailable() -> str:
    """Why no node can be started here, ending with what to do about it; empty if one can."""
    if shutil.which("java") is None:
        return f"Apache Kafka {VERSION} needs Java 17 or later, and there is no `java` on the PATH; install one, then: make kafka"
    if not cache_dir().is_dir():
        return f"the jars of Apache Kafka {VERSION} are not in {cache_dir()}; fetch them with Maven: make kafka-jars"
    return ""


def available() -> bool:
    """Whether a node can be started here."""
    return not why_unavailable()


def fetch_jars(timeout_seconds: float = FETCH_TIMEOUT_SECONDS) -> Path:
    """Copy the pinned jars (43 MB) into the cache with Maven, unless they are there. Returns their folder.

    Raises:
        UsageError: there is no Maven. Retryable: it reached no repository, or took too long.
    """
    target = cache_dir()
    if target.is_dir():
        return target
    if shutil.which("mvn") is None:
        raise UsageError(
            f"fetching Apache Kafka {VERSION} needs Maven, and there is no `mvn` on the PATH; install it, then: make kafka"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:  # renamed when whole: a reader never sees half of it
        jars = Path(scratch) / "jars"
        command = ["mvn", "--quiet", "--batch-mode", "--file", str(POM), "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
        except subprocess.TimeoutExpired:
            raise Retryable(
                f"Maven did not fetch Apache Kafka {VERSION} within {timeout_seconds:.0f} s; run again: make kafka-jars"
            ) from None
        if done.returncode:
            raise Retryable(
                f"Maven could not fetch Apache Kafka {VERSION}; where it reaches a repository, run again: make kafka-jars\n"
                + (done.stdout + done.stderr)[-LOG_TAIL_BYTES:].strip()
            )
        with contextlib.suppress(OSError):  # another process was quicker
            jars.rename(target)
    return target


class KafkaBroker:
    """Apache Kafka on 127.0.0.1, from `start()` (or `with`) to `stop()`; it never outlives this process.

    Its log lies in `state_dir` and is kept over stop, kill and start, at the same address: what `EmbeddedBroker` cannot do.

    Args:
        state_dir: where `data/`, `server.properties` and `broker.log` go (made if absent).
        port: 0 takes a free one at the first start.
        heap_mb: the limit of Java's heap; the log itself lives in the page cache.
    """

    def __init__(self, state_dir: Path, port: int = 0, heap_mb: int = 384) -> None:
        self._state_dir = state_dir
        self._asked_port = port
        self._ports = (0, 0)
        self._heap_mb = heap_mb
        self._cluster_id = ""
        log = state_dir / "broker.log"
        self._child = Child(f"Apache Kafka {VERSION}", log, keep_log=True, stop_seconds=STOP_TIMEOUT_SECONDS)

    @property
    def bootstrap_servers(self) -> str:
        """`host:port`, as `bootstrap.servers` wants it; known from the first start on, also while it is down."""
        if not self._ports[0]:
            raise UsageError("this Kafka node was never started; use `with KafkaBroker(...)` or call start()")
        return f"{HOST}:{self._ports[0]}"

    @property
    def cluster_id(self) -> str:
        """Made with the log, and the same as long as that is kept."""
        _ = self.pid  # as long as it runs
        return self._cluster_id

    @property
    def log_path(self) -> Path:
        """Where the node writes its warnings."""
        return self._child.log_path

    @property
    def pid(self) -> int:
        """The node's process id."""
        return self._child.pid

    def __enter__(self) -> KafkaBroker:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> KafkaBroker:
        """Start it on what the log holds, and wait until it answers.

        Raises:
            UsageError: Java or the jars are missing, the port is taken, or it already runs.
            Terminal: it ends at once or does not answer; with the tail of its log.
        """
        if self._child.running:
            raise UsageError(f"{self._child.name} is already running at {self.bootstrap_servers}")
        if reason := why_unavailable():
            raise UsageError(reason)
        if self._asked_port:
            require_free(self._asked_port)
        if not self._ports[0]:
            broker, controller = free_ports(2)
            self._ports = (self._asked_port or broker, controller)
        (self._state_dir / "data").mkdir(parents=True, exist_ok=True)
        properties = self._write_properties()
        if not (self._state_dir / "data" / "meta.properties").exists():
            self._format(properties)
        self._launch(self._child, "kafka.Kafka", str(properties))
        self._child.wait_until(self._answers, START_TIMEOUT_SECONDS)
        return self

    def stop(self) -> None:
        """Let it end in order (about a second); its log is kept. Safe to call twice."""
        self._child.stop()

    def kill(self) -> None:
        """SIGKILL, as a crash would; what it had acknowledged is in the log. Safe to call twice."""
        self._child.kill()

    def renew(self) -> None:
        """Start over with an empty log, at the same address: another cluster."""
        self.stop()
        shutil.rmtree(self._state_dir / "data")
        self.start()

    def coordinates_groups(self) -> bool:
        """Whether it still serves consumer groups.

        After a SIGKILL Kafka 4.1.1 can refuse to load the log of its group coordinator for good ("New last written offset
        1450 must be greater than 1450"): it then answers everything else, and each member with NOT_COORDINATOR.
        """
        # by a consumer: where the answer is an error, AdminClient.list_consumer_group_offsets of confluent-kafka 2.16 crashes
        probe = Consumer({"bootstrap.servers": self.bootstrap_servers, "log_level": 0, "group.id": "probe"})
        deadline = time.monotonic() + COORDINATOR_SECONDS
        try:
            while time.monotonic() < deadline:  # one that is only loading its log, or makes its topic, is well soon
                with contextlib.suppress(KafkaException):
                    probe.committed([TopicPartition("probe", 0)], timeout=2.0)
                    return True
                time.sleep(0.2)
            return False
        finally:
            probe.close()

    def pause(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing, until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def _write_properties(self) -> Path:
        broker, controller = self._ports
        here = {
            "listeners": f"PLAINTEXT://{HOST}:{broker},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{broker}",
            "controller.quorum.voters": f"1@{HOST}:{controller}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str((self._state_dir / "data").absolute()),
        }
        path = self._state_dir / "server.properties"
        path.write_text("".join(f"{k}={v}\n" for k, v in {**PROPERTIES, **here}.items()), "utf-8")
        return path

    def _format(self, properties: Path) -> None:
        made = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")  # as Kafka writes its ids
        formatting = Child(f"formatting {self._state_dir / 'data'} for Kafka", self.log_path, keep_log=True)
        self._launch(formatting, "kafka.tools.StorageTool", "format", f"--cluster-id={made}", f"--config={properties}")
        formatting.finish(START_TIMEOUT_SECONDS)

    def _launch(self, child: Child, *what: str) -> None:
        quiet = ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        # Serial: of the collectors the one that takes least beside writers on a small machine
        java = ["java", f"-Xmx{self._heap_mb}m", "-XX:+UseSerialGC", *quiet, "-cp", f"{cache_dir()}/*"]
        home = {name: os.environ[name] for name in ("JAVA_HOME",) if name in os.environ}
        child.launch([*java, *what], home, self._state_dir)

    def _answers(self) -> bool:
        if not accepts(self._ports[0]):  # librdkafka would back off for 100 ms and more
            return False
        try:
            answered = admin_client(self.bootstrap_servers).list_topics(timeout=2.0)
        except KafkaException:
            return False
        # it answers before it has been let into its cluster: until then it lists no broker
        if not answered.brokers or answered.cluster_id is None:
            return False
        self._cluster_id = answered.cluster_id
        return True


def main() -> int:
    """`python -m lakehouse.local.kafka`: fetch the jars if need be, run one node until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m lakehouse.local.kafka", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument("--dir", type=Path, help="keep the log in this folder (default: a temporary one, removed at the end)")
    parser.add_argument("--jars-only", action="store_true", help="fetch the jars and end")
    parser.add_argument("--fetch-seconds", type=float, default=FETCH_TIMEOUT_SECONDS, help="how long Maven may take")
    asked = parser.parse_args()
    try:
        if not cache_dir().is_dir():
            print(f"fetching Apache Kafka {VERSION} with Maven into {cache_dir()} (43 MB, once)", file=sys.stderr)  # noqa: T201
        fetch_jars(asked.fetch_seconds)
        if asked.jars_only:
            return 0
        with contextlib.ExitStack() as stack:
            state = asked.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kafka-")))
            node = stack.enter_context(KafkaBroker(state, asked.port))
            print(  # noqa: T201
                f"Apache Kafka {VERSION} runs; its log lies in {state}. Ctrl-C stops it.\n"
                f"export LAKEHOUSE_KAFKA_BOOTSTRAP={node.bootstrap_servers}",
                flush=True,
            )
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
    except LakehouseError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
