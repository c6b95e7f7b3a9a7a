"""The Python agent with every inference made ten percent longer: it spins for a tenth of the time that the runtime took.

The time is spent inside what the agent measures, so that it stands for a slower model, not for edited figures.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from device_bench.agent import agent

FACTOR = 1.1

load = agent.load


def load_slowed(job: dict[str, Any], runtime: Any) -> Any:
    model = load(job, runtime)
    run, clock = model.run, time.perf_counter_ns

    def run_slowed(feed: Any) -> Any:
        start = clock()
        result = run(feed)
        until = start + (clock() - start) * FACTOR
        while clock() < until:
            pass
        return result

    model.run = run_slowed
    return model


if __name__ == "__main__":
    agent.load = load_slowed
    sys.exit(agent.main(sys.argv[1:]))
