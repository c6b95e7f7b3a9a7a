"""A board whose wall clock is set while it measures (boards without a battery learn the time from the network): nobody notices."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time

import pytest

from device_bench.runner_build import build_runner, runner_arguments, runtime_library
from device_bench.targets import AGENT

# Every look at the wall clock is a day off, now forward, now back; the other clocks are the kernel's.
JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long looks;
static long jump(void) { return ++looks % 2 ? 86400 : -86400; }
int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now)
{
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
"""
LOOK = "import time; first, second = time.time(), time.time(); assert abs(first - second) > 86400"
LEAST_SECONDS, DEADLINE_S = 0.5, 60.0


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """With the clock; that it works is checked with Python's own."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("clock")
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(JUMPING_CLOCK, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"], check=True)
    changed = {**os.environ, "LD_PRELOAD": str(library)}
    subprocess.run([sys.executable, "-c", LOOK], env=changed, check=True)
    return changed


@pytest.mark.parametrize("engine", ["agent", "runner"])
def test_a_clock_that_jumps_changes_nothing(engine, environment, onnx_file, make_job, tmp_path):
    job = make_job(onnx_file, min_seconds=LEAST_SECONDS) | {"deadline_s": DEADLINE_S}
    if engine == "agent":
        (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, str(AGENT), str(tmp_path / "job.json")]
    else:
        command = [str(build_runner(platform.machine())), *runner_arguments(job, runtime_library("onnx"))]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * DEADLINE_S)
    took = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    samples_ns = answer["cases"][0]["samples_ns"]
    assert min(samples_ns) > 0
    assert sum(samples_ns) / 1e9 < took
    assert took > LEAST_SECONDS
    assert 0 < answer["load_ms"] < 1000 * took
