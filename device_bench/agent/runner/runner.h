/* What the three files of the runner share.
 *
 *   runner.c      the protocol: options, the process that waits, texts, measuring
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

#define AGENT "c runner 2"

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

typedef struct {
    const char *format, *entry_symbol;
    /* dlopens the library and writes its name and version, cut to `size`. */
    void (*open)(const ModelOptions *options, char *name, size_t size);
    void (*load)(const ModelOptions *options);
    /* Tokens that are computed for a text of `length` tokens. */
    int (*computed_length)(int length);
    /* Inputs of one text in buffers of their own, freed with `free_feed`. */
    Feed *(*make_feed)(const int32_t *ids, int length);
    void (*free_feed)(Feed *feed);
    /* What is timed. */
    void (*run)(const Feed *feed);
    /* Ends a run: its logits, valid until the next one, and their number where `classes` is not NULL. */
    const float *(*finish)(int *classes);
} Runtime;

extern const Runtime onnx_runtime, litert_runtime;

/* The runtime whose library this is, NULL if it is none of the two. */
const Runtime *identify_library(const char *library, char *name, size_t size);

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
