"""Streams against real processes: a replica is killed under its listeners, and none of them misses anything."""

import json
import subprocess
import sys
from pathlib import Path

import psycopg

from app import migrate


def test_listeners_of_a_killed_replica_resume_on_another_without_a_gap(
    database: str, tmp_path: Path
) -> None:
    """Two API processes, fifty listeners; one process gets SIGKILL in the middle and is started again.

    Every listener is told every event of the batch once, in order, by whichever process it reaches.
    """
    figures = tmp_path / "figures.json"
    with psycopg.connect(database) as conn:  # a server starts only on a schema that it knows
        conn.execute("create table alembic_version (version_num text)")
        conn.execute("insert into alembic_version values (%s)", (migrate.head(),))
    asked = f"--database {database} --replicas 2 --listeners 50 --seconds 5 --json {figures}"
    run = subprocess.run(
        [sys.executable, "-m", "bench", "sse", *asked.split()],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    told = json.loads(figures.read_text())
    assert told["complete"]
    assert told["gaps or repeats"] == 0
    assert told["events of the batch"] == 203
    assert told["connections made"] >= 75  # those of the killed one came again
