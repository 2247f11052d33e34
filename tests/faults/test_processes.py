"""Real writer processes on one table: in each other's way, and killed without notice. Every offset must be there once."""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from records import RAW, TOPIC, live_files, offsets
from writer_process import Place, write_until

from lakehouse.lake import Lake, history
from lakehouse.local import Kind
from lakehouse.positions import read_positions


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """A context whose processes need not import everything again: that would take them most of their time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lakehouse.commit", "lakehouse.staging", "lakehouse.lake", "hypothesis", "pytest"])
    return context


@pytest.fixture
def place(environment: Mapping[str, str], declared: Path) -> Place:
    return Place(environment, declared)


def test_many_writers_at_once(kind: Kind, lake: Lake, place: Place, processes: Any) -> None:
    """Four writers on a partition each, and two that race for a fifth."""
    lake.open_for_write(RAW)
    end = 20 if kind == "sqlite" else 6  # over a network each of them takes longer
    jobs = [(partition, f"writer {partition}") for partition in range(4)] + [(4, "racer a"), (4, "racer b")]
    writers = [processes.Process(target=write_until, args=(place, run, partition, end, 1)) for partition, run in jobs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [w.exitcode for w in writers] == [0] * 6
    table = lake.load(RAW)
    for partition in range(5):
        assert offsets(lake, partition) == list(range(end))
    assert {k: p.next_offset for k, p in read_positions(table.metadata)[RAW].items()} == {(TOPIC, p): end for p in range(5)}
    assert len(history(table)) == len(live_files(table)) == 5 * end  # each batch was one commit, and each file was committed once


@pytest.mark.parametrize("seed", range(2))
def test_a_writer_killed_again_and_again(lake: Lake, place: Place, processes: Any, seed: int) -> None:
    """SIGKILL at a random call of a function, anywhere in staging, committing, SQLAlchemy or pyiceberg; then started again."""
    lake.open_for_write(RAW)
    dice = random.Random(seed)
    deaths = 0
    for _ in range(6):
        call = dice.randrange(1, 150_000)
        writer = processes.Process(target=write_until, args=(place, "mortal", 0, 300, 7, call))
        writer.start()
        writer.join(60)
        assert writer.exitcode in (0, -signal.SIGKILL)
        deaths += writer.exitcode != 0
        assert offsets(lake) == list(range(lake.vector(RAW).get((TOPIC, 0), 0)))  # never the one without the other
    assert deaths == 6
    final = processes.Process(target=write_until, args=(place, "last", 0, 300, 100))
    final.start()
    final.join(60)
    assert final.exitcode == 0
    assert offsets(lake) == list(range(300))
