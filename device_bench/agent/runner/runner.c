/* pocketbert-runner: measure one model file on the machine this runs on, after a proof that its outputs are right.
 *
 *   pocketbert-runner --mode latency --runtime LIB --model FILE --format onnx --threads 1 --inputs FILE --case texts ...
 *
 * The sibling in C of agent.py, for places without Python: the same jobs (as options, listed in read_options), the same
 * answers, the same errors. Exactly one JSON document goes to standard output; whatever libraries print goes to standard
 * error. The process that was started forks before any library is opened: the child works, the parent waits, kills the
 * child at the deadline or when the host has gone, and says so when the kernel killed it.
 *
 * It needs libc alone: glibc no older than that of the compiler, or bionic of Android 7 (API 24). The runtime's library is
 * opened by path.
 *
 * What it does not do: time a model whose golden outputs are wrong; subtract the cost of calling a runtime; time and read
 * memory in one process; merge or compare runs; open a connection; change governors or clocks.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "runner.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MARK 0x7a
#define MAX_CHOSEN_CORES 1024

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "inputs files are little-endian");

typedef enum { INFO, LATENCY, MEMORY, OUTPUTS, COUNT, SUSTAINED, MODES } Mode;

static const char *const mode_names[MODES] = {"info", "latency", "memory", "outputs", "count", "sustained"};

typedef struct {
    int length;          /* 0: the real inputs */
    long min_inferences; /* 0: that of the job */
} Case;

static struct {
    Mode mode;
    const char *format, *cores, *inputs, *golden, *output, *root;
    double tolerance;
    Case *cases;
    size_t case_count;
    int warmup_window;
    double warmup_tolerance, warmup_max_seconds;
    long min_inferences;
    double min_seconds, window_seconds, deadline_s; /* 0: no deadline */
    bool watch_stdin;
    ModelOptions model;
} job = {
    .tolerance = -1, .min_seconds = -1, .root = "",
    .model = {.graph_level = 99, .memory_pattern = true, .memory_arena = true, .share_weights = true},
};

typedef struct {
    int64_t *values;
    size_t count, size;
} Samples;

static int answer_fd = STDOUT_FILENO;
static const Runtime *runtime;

/* --- the answer ------------------------------------------------------------------------------------------------------ */

static const struct {
    const char *name;
    int exit_code;
} error_kinds[] = {
    [INTERNAL] = {"internal", 1},
    [BAD_JOB] = {"bad_job", 2},
    [MISSING_RUNTIME] = {"missing_runtime", 2},
    [TOO_LONG] = {"too_long", 2},
    [WRONG_OUTPUT] = {"wrong_output", 3},
    [UNREADABLE_MODEL] = {"unreadable_model", 5},
    [FAILED_INFERENCE] = {"failed_inference", 5},
    [TIMEOUT] = {"timeout", 4},
    [OUT_OF_MEMORY] = {"out_of_memory", 4},
    [KILLED] = {"killed", 4},
    [HOST_GONE] = {"host_gone", 4},
};

/* A reader that has gone is nobody to tell. */
static void write_all(const char *text, size_t size)
{
    while (size > 0) {
        ssize_t written = write(answer_fd, text, size);
        if (written < 0 && errno != EINTR)
            return;
        text += written > 0 ? written : 0;
        size -= written > 0 ? (size_t)written : 0;
    }
}

static _Noreturn void answer_error(ErrorKind kind, const char *message, Number rss_bytes)
{
    Json json;
    json_start(&json);
    json_open(&json, '{');
    json_open(json_key(&json, "error"), '{');
    json_text(json_key(&json, "kind"), error_kinds[kind].name);
    json_text(json_key(&json, "message"), message);
    if (rss_bytes.known) {
        json_integer(json_key(&json, "rss_bytes"), rss_bytes.value);
    }
    json_close(&json, '}');
    json_close(&json, '}');
    fputc('\n', json.file);
    const char *document = json_finish(&json);
    write_all(document, strlen(document));
    _exit(error_kinds[kind].exit_code); /* no destructors of a runtime, which may hang or crash */
}

_Noreturn void fail(ErrorKind kind, const char *format, ...)
{
    char message[4096];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    answer_error(kind, message, (Number){0});
}

void *resize(void *memory, size_t bytes)
{
    static const char document[] = "{\"error\":{\"kind\":\"out_of_memory\",\"message\":\"the runner got no memory\"}}\n";
    memory = realloc(memory, bytes);
    if (memory == NULL) {
        write_all(document, sizeof document - 1);
        _exit(error_kinds[OUT_OF_MEMORY].exit_code);
    }
    return memory;
}

void *allocate(size_t bytes)
{
    return resize(NULL, bytes);
}

/* --- options --------------------------------------------------------------------------------------------------------- */

static double parse_number(const char *option, const char *text, double least)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !isfinite(value) || value < least)
        fail(BAD_JOB, "%s: '%s' is no number of at least %g", option, text, least);
    return value;
}

static long parse_integer(const char *option, const char *text, long least)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (end == text || *end != '\0' || errno != 0 || value < least || value > INT32_MAX)
        fail(BAD_JOB, "%s: '%s' is no whole number of at least %ld", option, text, least);
    return value;
}

static int parse_choice(const char *option, const char *text, const char *const *choices, size_t count)
{
    Json list;
    for (size_t i = 0; i < count; i++)
        if (strcmp(text, choices[i]) == 0)
            return (int)i;
    json_start(&list);
    for (size_t i = 0; i < count; i++)
        fprintf(list.file, "%s%s", i == 0 ? "" : ", ", choices[i]);
    fail(BAD_JOB, "%s: '%s' is none of %s", option, text, json_finish(&list));
}

static char *copy_text(const char *text)
{
    return strcpy(allocate(strlen(text) + 1), text);
}

/* "texts", "16" or "16:100" */
static void add_case(const char *option, const char *text)
{
    Case added = {0};
    char *copy = copy_text(text), *count = copy, *what = strsep(&count, ":");
    if (strcmp(what, "texts") != 0)
        added.length = (int)parse_integer(option, what, 1);
    if (count != NULL)
        added.min_inferences = parse_integer(option, count, 1);
    free(copy);
    job.cases = resize(job.cases, (job.case_count + 1) * sizeof *job.cases);
    job.cases[job.case_count++] = added;
}

/* "16,0.05,2.0": inferences of a window, tolerance, seconds at most */
static void read_warmup(const char *option, const char *text)
{
    char *copy = copy_text(text), *rest = copy, *window = strsep(&rest, ","), *tolerance = strsep(&rest, ",");
    if (tolerance == NULL || rest == NULL)
        fail(BAD_JOB, "%s: '%s' is not WINDOW,TOLERANCE,SECONDS", option, text);
    job.warmup_window = (int)parse_integer(option, window, 1);
    job.warmup_tolerance = parse_number(option, tolerance, 0);
    job.warmup_max_seconds = parse_number(option, rest, 0);
    free(copy);
}

static void add_config(const char *option, const char *text)
{
    ModelOptions *model = &job.model;
    char *value = copy_text(text), *key = strsep(&value, "=");
    if (value == NULL || *key == '\0')
        fail(BAD_JOB, "%s: '%s' is not KEY=VALUE", option, text);
    ConfigEntry *entries = resize((void *)model->config, (model->config_count + 1) * sizeof *entries);
    entries[model->config_count++] = (ConfigEntry){key, value};
    model->config = entries;
}

static void refuse_other_format(const char *option, const char *format)
{
    if (job.format != NULL && strcmp(job.format, format) != 0)
        fail(BAD_JOB, "%s is no option for %s files", option, job.format);
}

static void read_options(int count, char **arguments)
{
    static const char *const formats[] = {"onnx", "tflite"}, *const levels[] = {"disabled", "basic", "extended", "all"};
    static const char *const switches[] = {"0", "1"}, *const caches[] = {"none", "memory"};
    static const int level_numbers[] = {0, 1, 2, 99};
    const char *only_onnx = NULL, *only_tflite = NULL;
    bool has_mode = false;
    for (int i = 1; i < count; i++) {
        const char *option = arguments[i];
        if (strcmp(option, "--watch-stdin") == 0) {
            job.watch_stdin = true;
            continue;
        }
        const char *value = arguments[++i]; /* NULL after the last one */
        if (strncmp(option, "--", 2) != 0 || value == NULL)
            fail(BAD_JOB, "%s: not an option with a value", option);
#define IS(name) (strcmp(option, "--" name) == 0)
        if (IS("mode")) {
            job.mode = (Mode)parse_choice(option, value, mode_names, MODES);
            has_mode = true;
        } else if (IS("runtime"))
            job.model.library = value;
        else if (IS("model"))
            job.model.model = value;
        else if (IS("format"))
            job.format = formats[parse_choice(option, value, formats, ENTRIES(formats))];
        else if (IS("threads"))
            job.model.threads = (int)parse_integer(option, value, 1);
        else if (IS("cores"))
            job.cores = value;
        else if (IS("inputs"))
            job.inputs = value;
        else if (IS("golden"))
            job.golden = value;
        else if (IS("tolerance"))
            job.tolerance = parse_number(option, value, 0);
        else if (IS("case"))
            add_case(option, value);
        else if (IS("warmup"))
            read_warmup(option, value);
        else if (IS("min-inferences"))
            job.min_inferences = parse_integer(option, value, 1);
        else if (IS("min-seconds"))
            job.min_seconds = parse_number(option, value, 0);
        else if (IS("window-seconds"))
            job.window_seconds = parse_number(option, value, 0.001);
        else if (IS("output"))
            job.output = value;
        else if (IS("deadline-s"))
            job.deadline_s = parse_number(option, value, 0.001);
        else if (IS("root"))
            job.root = strcmp(value, "/") == 0 ? "" : value;
        else if (IS("graph-optimization-level"))
            job.model.graph_level = level_numbers[parse_choice(only_onnx = option, value, levels, ENTRIES(levels))];
        else if (IS("memory-pattern"))
            job.model.memory_pattern = parse_choice(only_onnx = option, value, switches, ENTRIES(switches)) == 1;
        else if (IS("memory-arena"))
            job.model.memory_arena = parse_choice(only_onnx = option, value, switches, ENTRIES(switches)) == 1;
        else if (IS("config"))
            add_config(only_onnx = option, value);
        else if (IS("weight-cache"))
            job.model.share_weights = parse_choice(only_tflite = option, value, caches, ENTRIES(caches)) == 1;
        else
            fail(BAD_JOB, "%s: no such option", option);
#undef IS
    }
    if (!has_mode)
        fail(BAD_JOB, "the job lacks mode");
    if (only_onnx != NULL)
        refuse_other_format(only_onnx, "onnx");
    if (only_tflite != NULL)
        refuse_other_format(only_tflite, "tflite");
}

/* Refuses a job that lacks what its mode needs, or names a file that is not there. */
static void check_job(void)
{
    bool timed = job.mode == LATENCY || job.mode == SUSTAINED;
    const struct {
        const char *key;
        bool missing;
    } needs[] = {
        {"runtime", job.model.library == NULL},
        {"model", job.model.model == NULL},
        {"format", job.format == NULL},
        {"threads", job.model.threads == 0},
        {"inputs", job.inputs == NULL},
        {"tolerance", job.golden != NULL && job.tolerance < 0},
        {"case", job.mode == LATENCY && job.case_count == 0},
        {"warmup", timed && job.warmup_window == 0},
        {"min-inferences", job.mode == LATENCY && job.min_inferences == 0},
        {"min-seconds", timed && job.min_seconds < 0},
        {"window-seconds", job.mode == SUSTAINED && job.window_seconds <= 0},
        {"output", job.mode == OUTPUTS && job.output == NULL},
    };
    char missing[256] = "";
    struct stat file;
    for (size_t i = 0; i < ENTRIES(needs); i++) {
        if (needs[i].missing) {
            strcat(missing, *missing == '\0' ? "" : ", ");
            strcat(missing, needs[i].key);
        }
    }
    if (*missing != '\0')
        fail(BAD_JOB, "the job lacks %s", missing);
    if (stat(job.model.model, &file) != 0 || !S_ISREG(file.st_mode))
        fail(BAD_JOB, "%s: no such file", job.model.model);
    if (stat(job.model.library, &file) != 0 || !S_ISREG(file.st_mode))
        fail(MISSING_RUNTIME, "%s: no such file; give libonnxruntime.so or libLiteRt.so for this machine", job.model.library);
    runtime = strcmp(job.format, onnx_runtime.format) == 0 ? &onnx_runtime : &litert_runtime;
}

/* --- the process that waits ------------------------------------------------------------------------------------------- */

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* a wall clock that is set meanwhile changes nothing */
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int64_t nanoseconds(double seconds)
{
    return (int64_t)(fmin(seconds, 1e9) * 1e9); /* thirty years fit 64 bits */
}

static const char *signal_name(int number)
{
    static const struct {
        int number;
        const char *name;
    } names[] = {
        {SIGKILL, "SIGKILL"}, {SIGSEGV, "SIGSEGV"}, {SIGBUS, "SIGBUS"}, {SIGILL, "SIGILL"}, {SIGABRT, "SIGABRT"}, {SIGFPE, "SIGFPE"},
        {SIGTERM, "SIGTERM"}, {SIGINT, "SIGINT"}, {SIGHUP, "SIGHUP"}, {SIGSYS, "SIGSYS"}, {SIGTRAP, "SIGTRAP"}, {SIGXCPU, "SIGXCPU"},
    };
    static char other[32];
    for (size_t i = 0; i < ENTRIES(names); i++)
        if (names[i].number == number)
            return names[i].name;
    snprintf(other, sizeof other, "signal %d", number);
    return other;
}

static _Noreturn void answer_death(ErrorKind kind, const char *reason, long max_rss_kb)
{
    char message[4096];
    snprintf(message, sizeof message, "%s: %s", job.model.model == NULL ? mode_names[job.mode] : job.model.model, reason);
    answer_error(kind, message, (Number){true, (long long)max_rss_kb * 1024});
}

/* Why a child died that a signal ended; `kills` are the kernel's counts of processes that it killed for memory. */
static _Noreturn void answer_signal(int number, long max_rss_kb, Number kills_before, Number kills_after)
{
    char reason[256];
    double held_mb = (double)max_rss_kb * 1024 / 1e6;
    if (number == SIGKILL && kills_before.known && kills_after.known && kills_after.value > kills_before.value) {
        snprintf(reason, sizeof reason, "out of memory: killed by the kernel; it held %.0f MB at most", held_mb);
        answer_death(OUT_OF_MEMORY, reason, max_rss_kb);
    }
    const char *likely = number == SIGKILL && !kills_after.known ? "; the kernel does not say whether for memory" : "";
    snprintf(reason, sizeof reason, "killed by %s%s; it held %.0f MB at most", signal_name(number), likely, held_mb);
    answer_death(KILLED, reason, max_rss_kb);
}

/* Sleeps until the worker has closed its pipe by ending, the deadline passes, or standard input ends. True: it must be stopped. */
static bool wait_for_end(int pipe_end, int64_t deadline_ns, Json *answer, ErrorKind *why)
{
    char bytes[65536];
    for (;;) {
        struct pollfd watched[] = {{pipe_end, POLLIN, 0}, {job.watch_stdin ? STDIN_FILENO : -1, POLLIN, 0}};
        int64_t left_ms = (deadline_ns - now_ns() + 999999) / 1000000;
        int ready = poll(watched, ENTRIES(watched), deadline_ns == INT64_MAX ? -1 : left_ms < 0 ? 0 : left_ms > INT32_MAX ? INT32_MAX : (int)left_ms);
        if (watched[0].revents != 0 && ready > 0) {
            ssize_t got = read(pipe_end, bytes, sizeof bytes);
            if (got == 0)
                return false;
            if (got > 0)
                fwrite(bytes, 1, (size_t)got, answer->file);
        }
        if (watched[1].revents != 0 && ready > 0 && read(STDIN_FILENO, bytes, sizeof bytes) <= 0) {
            *why = HOST_GONE;
            return true;
        }
        if (now_ns() >= deadline_ns) {
            *why = TIMEOUT;
            return true;
        }
    }
}

static int wait_for_worker(pid_t worker, int pipe_end, int64_t deadline_ns, Number kills_before)
{
    Json answer;
    ErrorKind why;
    struct rusage usage = {0};
    int status = 0;
    json_start(&answer);
    bool stopped = wait_for_end(pipe_end, deadline_ns, &answer, &why);
    if (stopped) {
        kill(-worker, SIGKILL); /* with whatever it started */
        kill(worker, SIGKILL);
    }
    while (wait4(worker, &status, 0, &usage) < 0 && errno == EINTR)
        ;
    if (stopped && why == HOST_GONE)
        answer_death(why, "the host has gone; stopped", usage.ru_maxrss);
    if (stopped) {
        char reason[64];
        snprintf(reason, sizeof reason, "no end within %g s; stopped", job.deadline_s);
        answer_death(why, reason, usage.ru_maxrss);
    }
    if (WIFSIGNALED(status))
        answer_signal(WTERMSIG(status), usage.ru_maxrss, kills_before, read_field(job.root, "proc/vmstat", "oom_kill ", 1));
    const char *document = json_finish(&answer);
    size_t size = answer.size;
    if (size == 0 || document[size - 1] != '\n')
        fail(INTERNAL, "the worker ended with exit code %d and no answer", WEXITSTATUS(status));
    write_all(document, size);
    return WEXITSTATUS(status);
}

/* Forks. The parent's result is its exit code; the child gets -1 and answers into a pipe, so that one that dies while it
 * writes leaves no half of a document. */
static int supervise(void)
{
    int ends[2];
    int64_t deadline_ns = job.deadline_s > 0 ? now_ns() + nanoseconds(job.deadline_s) : INT64_MAX;
    Number kills_before = read_field(job.root, "proc/vmstat", "oom_kill ", 1);
    pid_t parent = getpid();
    signal(SIGCHLD, SIG_DFL); /* a shell may have left it ignored, and then nobody can wait */
    signal(SIGPIPE, SIG_IGN);
    if (pipe2(ends, O_CLOEXEC) != 0)
        fail(INTERNAL, "no pipe: %s", strerror(errno));
    pid_t worker = fork();
    if (worker < 0)
        fail(INTERNAL, "no second process: %s", strerror(errno));
    if (worker > 0) {
        setpgid(worker, worker); /* both sides say so, because either may be first */
        close(ends[1]);
        return wait_for_worker(worker, ends[0], deadline_ns, kills_before);
    }
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) /* it was gone before the line above */
        _exit(error_kinds[HOST_GONE].exit_code);
    close(ends[0]);
    answer_fd = ends[1];
    int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(nothing, STDIN_FILENO);
    close(nothing);
    return -1;
}

/* --- what a job names -------------------------------------------------------------------------------------------------- */

/* Runs on the chosen cores only, with every thread started from now on. */
static void pin(void)
{
    int cores[MAX_CHOSEN_CORES];
    size_t count = 0;
    cpu_set_t wanted, given;
    Json list;
    if (strcmp(job.cores, "big") == 0 || strcmp(job.cores, "little") == 0) {
        const char *reason = NULL;
        count = named_cores(job.root, job.cores, cores, ENTRIES(cores), &reason);
        if (count == 0)
            fail(BAD_JOB, "cores '%s': %s; leave cores out or give their numbers", job.cores, reason);
    } else {
        char *copy = copy_text(job.cores), *rest = copy;
        for (char *core; (core = strsep(&rest, ",")) != NULL && count < ENTRIES(cores);)
            cores[count++] = (int)parse_integer("--cores", core, 0);
        free(copy);
    }
    CPU_ZERO(&wanted);
    CPU_ZERO(&given);
    bool refused = false;
    for (size_t i = 0; i < count; i++) {
        refused = refused || cores[i] >= CPU_SETSIZE;
        if (cores[i] < CPU_SETSIZE)
            CPU_SET(cores[i], &wanted);
    }
    refused = refused || sched_setaffinity(0, sizeof wanted, &wanted) != 0;
    if (sched_getaffinity(0, sizeof given, &given) == 0 && !refused && CPU_EQUAL(&given, &wanted))
        return;
    json_start(&list);
    for (size_t i = 0; i < count; i++)
        fprintf(list.file, "%s%d", i == 0 ? "[" : ", ", cores[i]);
    fputs("]; this process may use [", list.file);
    for (int core = 0, first = 1; core < CPU_SETSIZE; core++) {
        if (CPU_ISSET(core, &given)) {
            fprintf(list.file, "%s%d", first ? "" : ", ", core);
            first = 0;
        }
    }
    fail(BAD_JOB, "cannot pin to cores %s]", json_finish(&list));
}

static Feed *input_feed(const Inputs *inputs, int number)
{
    int32_t first = inputs->offsets[number];
    return runtime->make_feed(inputs->ids + first, inputs->types + first, input_length(inputs, number));
}

static const Outputs *infer_input(const Inputs *inputs, int number)
{
    Feed *feed = input_feed(inputs, number);
    runtime->run(feed);
    const Outputs *outputs = runtime->finish(input_length(inputs, number));
    runtime->free_feed(feed);
    return outputs;
}

static void check_golden(const Inputs *golden)
{
    for (int number = 0; number < golden->count; number++)
        check_outputs(job.model.model, infer_input(golden, number), golden, number, job.tolerance);
}

/* --- measuring --------------------------------------------------------------------------------------------------------- */

static void write_milliseconds(Json *json, const char *key, double nanoseconds)
{
    if (key != NULL)
        json_key(json, key);
    json_number(json, nanoseconds / 1e6, 5);
}

static void add_sample(Samples *samples, int64_t value)
{
    if (samples->count == samples->size) {
        samples->size = samples->size == 0 ? 4096 : 2 * samples->size;
        samples->values = resize(samples->values, samples->size * sizeof *samples->values);
    }
    samples->values[samples->count++] = value;
}

static int compare_samples(const void *left, const void *right)
{
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;
    return (a > b) - (a < b);
}

/* Between the two nearest samples, as numpy does it to the last bit. */
static double percentile(const int64_t *sorted, size_t count, int per_cent)
{
    double place = (double)(count - 1) * ((double)per_cent / 100);
    size_t below = (size_t)place, above = below + 1 < count ? below + 1 : below;
    double part = place - (double)below, low = (double)sorted[below], high = (double)sorted[above];
    return part >= 0.5 ? high - (high - low) * (1 - part) : low + (high - low) * part;
}

static int64_t *sorted_copy(const Samples *samples)
{
    int64_t *sorted = allocate(samples->count * sizeof *sorted);
    memcpy(sorted, samples->values, samples->count * sizeof *sorted);
    qsort(sorted, samples->count, sizeof *sorted, compare_samples);
    return sorted;
}

static int64_t timed_run(const Feed *feed)
{
    int64_t start = now_ns();
    runtime->run(feed);
    int64_t end = now_ns();
    runtime->finish(0);
    return end - start;
}

static double median(double *values, size_t count)
{
    for (size_t i = 1; i < count; i++)
        for (size_t at = i; at > 0 && values[at] < values[at - 1]; at--) {
            double value = values[at];
            values[at] = values[at - 1];
            values[at - 1] = value;
        }
    return count % 2 == 1 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

typedef struct {
    size_t inferences;
    double seconds;
    bool stable;
} Warmup;

/* One window of inferences again and again until two successive medians agree. It holds the same inputs each time, or their
 * lengths would be compared. */
static Warmup warm_up(Feed *const *shapes, size_t shape_count, Feed *const *feeds, size_t feed_count)
{
    Warmup done = {.inferences = shape_count};
    size_t window = (size_t)job.warmup_window;
    double *samples = allocate(window * sizeof *samples), last = -1;
    for (size_t i = 0; i < shape_count; i++)
        timed_run(shapes[i]);
    int64_t start = now_ns();
    while (!done.stable && done.seconds < job.warmup_max_seconds) {
        size_t count = 0;
        while (count < window) {
            samples[count] = (double)timed_run(feeds[count % feed_count]);
            count++;
            done.inferences++;
            done.seconds = (double)(now_ns() - start) / 1e9;
            if (done.seconds >= job.warmup_max_seconds)
                break;
        }
        if (count < window || done.seconds >= job.warmup_max_seconds)
            break;
        double middle = median(samples, count);
        done.stable = last >= 0 && fabs(middle - last) <= job.warmup_tolerance * last;
        last = middle;
    }
    free(samples);
    return done;
}

/* Nanoseconds of each inference, over and over the feeds from number `first` on, until both minimums are reached. */
static void time_inferences(Feed *const *feeds, size_t count, size_t first, size_t min_inferences, double min_seconds, Samples *samples)
{
    int64_t deadline = now_ns() + nanoseconds(min_seconds);
    for (size_t i = first;; i = i + 1 == count ? 0 : i + 1) {
        int64_t start = now_ns();
        runtime->run(feeds[i]);
        int64_t end = now_ns();
        runtime->finish(0);
        add_sample(samples, end - start);
        if (samples->count >= min_inferences && end >= deadline)
            return;
    }
}

static void write_summary(Json *json, const Samples *samples)
{
    static const struct {
        const char *key;
        int per_cent;
    } named[] = {{"p50_ms", 50}, {"p90_ms", 90}, {"p99_ms", 99}, {"min_ms", 0}};
    int64_t *sorted = sorted_copy(samples);
    double sum = 0;
    for (size_t i = 0; i < samples->count; i++)
        sum += (double)samples->values[i];
    json_integer(json_key(json, "count"), (long long)samples->count);
    write_milliseconds(json, "mean_ms", sum / (double)samples->count);
    for (size_t i = 0; i < ENTRIES(named); i++)
        write_milliseconds(json, named[i].key, percentile(sorted, samples->count, named[i].per_cent));
    json_open(json_key(json, "quantiles_ms"), '[');
    for (int per_cent = 0; per_cent <= 100; per_cent++)
        write_milliseconds(json, NULL, percentile(sorted, samples->count, per_cent));
    json_close(json, ']');
    json_open(json_key(json, "samples_ns"), '[');
    for (size_t i = 0; i < samples->count; i++)
        json_integer(json, samples->values[i]);
    json_close(json, ']');
    free(sorted);
}

/* The feeds of a case: the inputs, or the first of them repeated or cut to one length. */
static Feed **case_feeds(const Case *measured, const Inputs *inputs, size_t *count, int *lengths)
{
    *count = (size_t)inputs->count;
    if (measured->length > 0 && *count > (size_t)job.warmup_window)
        *count = (size_t)job.warmup_window;
    Feed **feeds = allocate(*count * sizeof *feeds);
    size_t row = (size_t)(measured->length + 1);
    int32_t *ids = allocate(row * sizeof *ids), *types = allocate(row * sizeof *types);
    for (size_t i = 0; i < *count; i++) {
        int number = (int)i, length = input_length(inputs, number);
        lengths[i] = measured->length > 0 ? measured->length : length;
        for (int token = 0; token < measured->length; token++) {
            ids[token] = inputs->ids[inputs->offsets[number] + token % length];
            types[token] = inputs->types[inputs->offsets[number] + token % length];
        }
        feeds[i] = measured->length > 0 ? runtime->make_feed(ids, types, measured->length) : input_feed(inputs, number);
    }
    free(ids);
    free(types);
    return feeds;
}

static void measure_case(Json *json, const Case *measured, const Inputs *inputs)
{
    size_t count, shape_count = 0;
    int *lengths = allocate((size_t)inputs->count * sizeof *lengths), *computed = allocate((size_t)inputs->count * sizeof *computed);
    Feed **feeds = case_feeds(measured, inputs, &count, lengths), **shapes = allocate(count * sizeof(Feed *));
    for (size_t i = 0; i < count; i++) { /* one feed of each computed length */
        size_t shape = 0;
        int length = runtime->computed_length(lengths[i]);
        while (shape < shape_count && computed[shape] != length)
            shape++;
        shape_count += shape == shape_count;
        computed[shape] = length;
        shapes[shape] = feeds[i];
    }
    Warmup warmup = warm_up(shapes, shape_count, feeds, count);
    Samples samples = {0};
    long min_inferences = measured->min_inferences > 0 ? measured->min_inferences : job.min_inferences;
    time_inferences(feeds, count, 0, (size_t)min_inferences, job.min_seconds, &samples);
    double tokens = 0;
    for (size_t i = 0; i < samples.count; i++)
        tokens += lengths[i % count];
    json_open(json, '{');
    json_text(json_key(json, "case"), measured->length > 0 ? "length" : "texts");
    json_value(json_key(json, "length"), (Number){measured->length > 0, measured->length});
    json_number(json_key(json, "tokens_mean"), tokens / (double)samples.count, 3);
    json_open(json_key(json, "warmup"), '{');
    json_integer(json_key(json, "inferences"), (long long)warmup.inferences);
    json_number(json_key(json, "seconds"), warmup.seconds, 3);
    json_bool(json_key(json, "stable"), warmup.stable);
    json_close(json, '}');
    write_summary(json, &samples);
    json_close(json, '}');
    for (size_t i = 0; i < count; i++)
        runtime->free_feed(feeds[i]);
    free(feeds);
    free(shapes);
    free(lengths);
    free(computed);
    free(samples.values);
}

/* Load and first inference, then each case; all in one process on one loaded model. */
static void measure_latency(Json *json, const Inputs *inputs, const Inputs *golden)
{
    int64_t start = now_ns();
    runtime->load(&job.model);
    int64_t loaded = now_ns();
    Feed *first = input_feed(golden == NULL ? inputs : golden, 0);
    int64_t first_ns = timed_run(first);
    runtime->free_feed(first);
    if (golden != NULL)
        check_golden(golden);
    write_milliseconds(json, "load_ms", (double)(loaded - start));
    write_milliseconds(json, "first_inference_ms", (double)first_ns);
    json_open(json_key(json, "cases"), '[');
    for (size_t i = 0; i < job.case_count; i++)
        measure_case(json, &job.cases[i], inputs);
    json_close(json, ']');
}

static void load_and_check(const Inputs *golden)
{
    runtime->load(&job.model);
    if (golden != NULL)
        check_golden(golden);
}

/* Peak RSS after every input ran once, against the RSS with library, inputs and golden cases but no model. */
static void measure_memory(Json *json, const Inputs *inputs, const Inputs *golden)
{
    Number baseline = read_field(job.root, "proc/self/status", "VmRSS:", 1024);
    load_and_check(golden);
    for (int number = 0; number < inputs->count; number++)
        infer_input(inputs, number);
    Number peak = read_field(job.root, "proc/self/status", "VmHWM:", 1024);
    json_open(json_key(json, "memory"), '{');
    json_value(json_key(json, "baseline_bytes"), baseline);
    json_value(json_key(json, "peak_bytes"), peak);
    json_value(json_key(json, "model_bytes"), (Number){baseline.known && peak.known, peak.value - baseline.value});
    json_value(json_key(json, "pss_bytes"), read_field(job.root, "proc/self/smaps_rollup", "Pss:", 1024));
    json_value(json_key(json, "dumpsys_pss_bytes"), read_dumpsys_pss());
    json_close(json, '}');
}

/* What the model gives for every input, for a proof elsewhere that this machine computes what others do. */
static void write_outputs(Json *json, const Inputs *inputs, const Inputs *golden)
{
    Collected collected = {0};
    FILE *file = fopen(job.output, "we");
    if (file == NULL)
        fail(BAD_JOB, "%s: cannot be written: %s", job.output, strerror(errno));
    load_and_check(golden);
    for (int number = 0; number < inputs->count; number++)
        collect_outputs(job.model.model, &collected, infer_input(inputs, number), number, inputs->count);
    write_collected(file, inputs, &collected);
    if (fflush(file) != 0 || ferror(file) || fclose(file) != 0)
        fail(BAD_JOB, "%s: cannot be written: %s", job.output, strerror(errno));
    json_open(json_key(json, "outputs"), '[');
    for (size_t i = 0; i < collected.count; i++)
        json_text(json, collected.outputs[i].name);
    json_close(json, ']');
}

/* Each input once to warm up and once between two marks, which a kernel refuses and an emulator counts between. */
static void mark_inferences(Json *json, const Inputs *inputs, const Inputs *golden)
{
    load_and_check(golden);
    for (int number = 0; number < inputs->count; number++) {
        Feed *feed = input_feed(inputs, number);
        timed_run(feed);
        syscall(SYS_getpriority, MARK, 2 * number);
        runtime->run(feed);
        syscall(SYS_getpriority, MARK, 2 * number + 1);
        runtime->finish(0);
        runtime->free_feed(feed);
    }
    json_integer(json_key(json, "marked"), inputs->count);
}

/* One window after the other, with clocks and temperatures, to show what heat does. */
static void measure_sustained(Json *json, const Inputs *inputs, const Inputs *golden)
{
    load_and_check(golden);
    size_t count = (size_t)inputs->count, position = 0;
    Feed **feeds = allocate(count * sizeof *feeds);
    for (size_t i = 0; i < count; i++)
        feeds[i] = input_feed(inputs, (int)i);
    warm_up(feeds, count, feeds, count);
    json_open(json_key(json, "windows"), '[');
    int64_t start = now_ns();
    for (int64_t at; (at = now_ns() - start) < nanoseconds(job.min_seconds);) {
        Samples samples = {0};
        time_inferences(feeds, count, position, 1, job.window_seconds, &samples);
        position = (position + samples.count) % count; /* so that every window sees a fair mix of the inputs */
        int64_t *sorted = sorted_copy(&samples);
        json_open(json, '{');
        json_number(json_key(json, "at_s"), (double)at / 1e9, 3);
        json_integer(json_key(json, "count"), (long long)samples.count);
        write_milliseconds(json, "p50_ms", percentile(sorted, samples.count, 50));
        write_milliseconds(json, "p90_ms", percentile(sorted, samples.count, 90));
        write_state(json, job.root, true);
        json_close(json, '}');
        free(sorted);
        free(samples.values);
    }
    json_close(json, ']');
}

/* --- the work ---------------------------------------------------------------------------------------------------------- */

static void write_info(Json *json)
{
    char name[512];
    const Runtime *found = job.model.library == NULL ? NULL : identify_library(job.model.library, name, sizeof name);
    json_open(json_key(json, "conditions"), '{');
    write_conditions(json, job.root, NULL);
    write_state(json_key(json, "before"), job.root, false);
    json_close(json, '}');
    json_open(json_key(json, "formats"), '{');
    if (found != NULL) {
        json_text(json_key(json, found->format), name);
    }
    json_close(json, '}');
}

static void write_measurement(Json *json)
{
    static void (*const measures[MODES])(Json *, const Inputs *, const Inputs *) = {
        [LATENCY] = measure_latency, [MEMORY] = measure_memory, [OUTPUTS] = write_outputs,
        [COUNT] = mark_inferences, [SUSTAINED] = measure_sustained,
    };
    char name[512];
    if (job.cores != NULL)
        pin(); /* before the library is opened, because it may start threads */
    runtime->open(&job.model, name, sizeof name);
    Inputs inputs = read_inputs(job.inputs), golden = job.golden == NULL ? (Inputs){0} : read_inputs(job.golden);
    if (job.golden != NULL && golden.output_count == 0)
        fail(BAD_JOB, "%s: has no outputs", job.golden);
    Json conditions;
    json_start(&conditions);
    write_conditions(&conditions, job.root, name);
    write_state(json_key(&conditions, "before"), job.root, false);
    json_text(json_key(json, "runtime"), name);
    measures[job.mode](json, &inputs, job.golden == NULL ? NULL : &golden);
    write_state(json_key(&conditions, "after"), job.root, false);
    json_open(json_key(json, "conditions"), '{');
    json_raw(json, json_finish(&conditions));
    json_close(json, '}');
}

int main(int count, char **arguments)
{
    while ((answer_fd = open("/dev/null", O_RDWR)) >= 0 && answer_fd <= STDERR_FILENO)
        ; /* standard streams that the caller had closed */
    close(answer_fd);
    answer_fd = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1); /* for the answer alone: libraries print when they like */
    dup2(STDERR_FILENO, STDOUT_FILENO);
    read_options(count, arguments);
    if (job.mode != INFO)
        check_job();
    int exit_code = supervise();
    if (exit_code >= 0)
        return exit_code;
    Json json;
    json_start(&json);
    json_open(&json, '{');
    if (job.mode == INFO)
        write_info(&json);
    else
        write_measurement(&json);
    json_close(&json, '}');
    fputc('\n', json.file);
    const char *document = json_finish(&json);
    write_all(document, json.size);
    _exit(0); /* no destructors of a runtime, which may hang or crash */
}
