/* What the four files of the runner share.
 *
 *   runner.c      the protocol: options, the process that waits, measuring
 *   inputs.c      inputs files: what a model is run on, and what it should give
 *   runtimes.c    ONNX Runtime and LiteRT behind one table of functions
 *   conditions.c  what the machine says of itself, and JSON
 *
 * A process measures one model, so each file keeps its state in statics and frees nothing that lives until the end.
 */
#ifndef POCKETBERT_RUNNER_H
#define POCKETBERT_RUNNER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define AGENT "c runner 3"
#define NAME_BYTES 64 /* of an output, the zero behind it included */

#define ENTRIES(array) (sizeof(array) / sizeof *(array))

/* --- errors (runner.c): each ends the process with one JSON document and the exit code of its kind ----------------- */

typedef enum {
    INTERNAL, BAD_JOB, MISSING_RUNTIME, TOO_LONG, WRONG_OUTPUT, UNREADABLE_MODEL, FAILED_INFERENCE, TIMEOUT, OUT_OF_MEMORY, KILLED,
    HOST_GONE
} ErrorKind;

_Noreturn void fail(ErrorKind kind, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Never NULL: without memory the process ends as out_of_memory. The result of `resize` keeps what was there. */
void *allocate(size_t bytes);
void *resize(void *memory, size_t bytes);

/* --- models (runtimes.c) -------------------------------------------------------------------------------------------- */

typedef struct {
    const char *key, *value;
} ConfigEntry;

/* How a runtime is to run the model; the defaults are those of the Python agent. */
typedef struct {
    const char *library, *model;
    int threads;
    int graph_level; /* ONNX Runtime's number */
    bool memory_pattern, memory_arena;
    const ConfigEntry *config;
    size_t config_count;
    bool share_weights; /* LiteRT: one copy of packed weights for all signatures */
} ModelOptions;

typedef struct Feed Feed;

/* An output of one input: a vector where `width` is 0, else rows of that width; nothing that was computed for padding. */
typedef struct {
    const char *name;
    size_t width, count; /* count: values */
    float *values;
} Tensor;

typedef struct {
    size_t count;
    Tensor *tensors; /* in the order of their names' bytes */
} Outputs;

typedef struct {
    const char *format, *entry_symbol;
    /* dlopens the library and writes its name and version, cut to `size`. */
    void (*open)(const ModelOptions *options, char *name, size_t size);
    void (*load)(const ModelOptions *options);
    /* Tokens that are computed for an input of `length` tokens. */
    int (*computed_length)(int length);
    /* One input in buffers of its own, freed with `free_feed`. */
    Feed *(*make_feed)(const int32_t *ids, const int32_t *types, int length);
    void (*free_feed)(Feed *feed);
    /* What is timed. */
    void (*run)(const Feed *feed);
    /* Ends a run. What it gave for an input of `length` tokens, valid until the next one; NULL where `length` is 0. */
    const Outputs *(*finish)(int length);
} Runtime;

extern const Runtime onnx_runtime, litert_runtime;

/* The runtime whose library this is, NULL if it is none of the two. */
const Runtime *identify_library(const char *library, char *name, size_t size);

/* --- inputs files (inputs.c) ------------------------------------------------------------------------------------------- */

/* What a model should give for every input. */
typedef struct {
    const char *name;
    size_t width;
    const int32_t *offsets; /* [count + 1], into `values` */
    const float *values;
} Output;

typedef struct {
    int count;
    const int32_t *offsets, *ids, *types; /* offsets: [count + 1], into the other two */
    size_t output_count;
    Output *outputs;
} Inputs;

/* What a model gave so far, input after input. */
typedef struct {
    const char *name;
    size_t width, size;
    int32_t *offsets;
    float *values;
} CollectedOutput;

typedef struct {
    size_t count;
    CollectedOutput *outputs;
} Collected;

Inputs read_inputs(const char *path);
int input_length(const Inputs *inputs, int number);
/* Refuses a model whose output for a golden input is missing, of another shape, off by more than the tolerance, or not a number. */
void check_outputs(const char *model, const Outputs *got, const Inputs *golden, int number, double tolerance);
/* Keeps what the model gave for input `number` of `inputs`. */
void collect_outputs(const char *model, Collected *collected, const Outputs *got, int number, int inputs);
/* Writes `inputs` with what was collected for all of them, instead of outputs of their own. */
void write_collected(FILE *file, const Inputs *inputs, const Collected *collected);

/* --- JSON (conditions.c): commas set themselves ---------------------------------------------------------------------- */

typedef struct {
    FILE *file;
    bool comma;
    char *text; /* complete after json_finish */
    size_t size;
} Json;

void json_start(Json *json);
const char *json_finish(Json *json);
void json_open(Json *json, char bracket);
void json_close(Json *json, char bracket);
Json *json_key(Json *json, const char *key); /* its argument, for the value */
void json_text(Json *json, const char *text); /* NULL: null. Bytes that are no UTF-8 become U+FFFD. */
void json_integer(Json *json, long long value);
void json_number(Json *json, double value, int decimals);
void json_bool(Json *json, bool value);
void json_null(Json *json);
void json_raw(Json *json, const char *members); /* what another writer finished, without its brackets */

/* --- conditions (conditions.c): files under `root` ------------------------------------------------------------------- */

typedef struct {
    bool known;
    long long value;
} Number;

/* Members of the object that does not change during a run; `runtime` may be NULL. */
void write_conditions(Json *json, const char *root, const char *runtime);
/* The object of what changes; `brief`: clocks and temperatures alone, as members. */
void write_state(Json *json, const char *root, bool brief);
/* The number behind a word such as "VmRSS:" at the start of a line of a file such as "proc/self/status", times `unit`. */
Number read_field(const char *root, const char *file, const char *word, long long unit);
/* Android: "TOTAL PSS" of this process as dumpsys says it. */
Number read_dumpsys_pss(void);
/* Numbers of the cores that "big" or "little" names, at most `size`; 0 and a reason if the machine has no such. */
size_t named_cores(const char *root, const char *name, int *cores, size_t size, const char **reason);
void json_value(Json *json, Number number);

#endif
