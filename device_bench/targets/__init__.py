"""Places to measure: this machine, boards behind SSH, phones behind ADB, emulated ARM.

``open_target`` (``device_bench/lab.py``) makes one of a name such as ``ssh:pi@rpi5``; ``base.py`` says what each can do.
"""

from device_bench.targets.base import AGENT, FILE_KEYS, Finished, OutOfMemory, RemoteTarget, Target, parse_answer
from device_bench.targets.local import LocalTarget, all_threads

__all__ = ["AGENT", "FILE_KEYS", "Finished", "LocalTarget", "OutOfMemory", "RemoteTarget", "Target", "all_threads", "parse_answer"]
