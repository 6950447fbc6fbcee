"""Processes that work together: what one alone does, and what two real ones tell each other."""

import os
import subprocess
import sys

import numpy as np
import pytest

from keysieve.compiler.workers import Workers, process_group
from keysieve.errors import StatisticsError

TWO = """
import sys
import numpy as np
from keysieve.compiler.workers import Workers, process_group
from keysieve.errors import ConfigError, StatisticsError

def fail():
    assert workers.first
    raise StatisticsError("the file is damaged")

with process_group() as first:
    workers = Workers()
    assert (workers.count, workers.first) == (2, first)
    assert workers.gather(workers.rank * 3) == [0, 3]
    assert workers.on_first(lambda: ("done", workers.rank)) == ("done", 0)
    assert workers.sum(np.array([1.5, workers.rank])).tolist() == [3.0, 1.0]
    assert workers.on_this_machine() == 2
    workers.check_equal("text", "same")
    try:
        workers.check_equal("text", workers.rank)
        sys.exit("no error")
    except ConfigError as error:
        assert str(error).startswith("process 1 has another text than process 0; give all of them")
    try:
        workers.on_first(fail)
        sys.exit("no error")
    except StatisticsError as error:
        assert str(error) == "the file is damaged"
    if first:
        print("well")
"""


def test_one_alone_does_it_all() -> None:
    with process_group() as first:
        workers = Workers()
        assert first and workers.first and workers.count == 1
    assert workers.gather("x") == ["x"]
    assert workers.on_first(lambda: 5) == 5
    assert workers.sum(np.array([1.5])).tolist() == [1.5]
    assert workers.on_this_machine() == 1
    workers.check_equal("text", "x")

    def fail() -> None:
        raise StatisticsError("damaged")

    with pytest.raises(StatisticsError, match="damaged"):
        workers.on_first(fail)


@pytest.mark.slow
def test_two_processes_agree() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-c", TWO], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
