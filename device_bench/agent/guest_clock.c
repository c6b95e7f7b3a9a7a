/* The clock of a guest whose instructions are counted: every look at it takes one microsecond, and nothing else takes any.
 *
 *     LD_PRELOAD=guest_clock.so ./program
 *
 * ONNX Runtime reads the clock in every run and does more when some seconds have passed since the last time, so that its
 * instructions would depend on how busy the emulating machine is.
 *
 * What this does not do: reach programs that are linked statically or that ask the kernel themselves.
 */
#include <sys/time.h>
#include <time.h>

enum { START_S = 1700000000 };

static long long microseconds;

int clock_gettime(clockid_t clock, struct timespec *now) {
    (void)clock;
    microseconds++;
    now->tv_sec = START_S + microseconds / 1000000;
    now->tv_nsec = microseconds % 1000000 * 1000;
    return 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    microseconds++;
    now->tv_sec = START_S + microseconds / 1000000;
    now->tv_usec = microseconds % 1000000;
    return 0;
}

time_t time(time_t *now) {
    time_t seconds = START_S + ++microseconds / 1000000;
    if (now) *now = seconds;
    return seconds;
}
