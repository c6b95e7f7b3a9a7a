/* ONNX Runtime and LiteRT, opened at run time: own declarations of the few functions that are called, no headers of theirs.
 *
 * ONNX Runtime gives a table of functions that only ever grows at its end, so a place in it is a promise. LiteRT exports
 * functions one by one and has changed their parameters under the same names (LiteRtCreateModelFromFile in 2.1.6), so a
 * library is refused that lacks LiteRtCreateModelFromFd, which came with that change.
 *
 * What this does not do: run on a GPU or NPU; batch; tokenize; call the TFLite interpreter, which libLiteRt.so has not.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "runner.h"

#include <dirent.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_INPUTS 3
#define MAX_BUCKETS 64

typedef void (*AnyFunction)(void);

static const char *const input_names[] = {"input_ids", "attention_mask", "token_type_ids"};
enum { INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS };
/* Outputs [1, tokens]; one of rank 3 has a row per token anyway. */
static const char *const per_token_names[] = {"start_logits", "end_logits"};

/* --- what both share ------------------------------------------------------------------------------------------------- */

static const ModelOptions *options;
static Outputs result; /* of the last run, where somebody asked */

/* Opens what lies beside the library: on a phone nothing else tells the loader that libc++_shared.so is there. */
static void open_neighbours(const char *library)
{
    char folder[512], path[1024];
    const char *name = strrchr(library, '/');
    snprintf(folder, sizeof folder, "%.*s", name == NULL ? 1 : (int)(name - library), name == NULL ? "." : library);
    name = name == NULL ? library : name + 1;
    DIR *entries = opendir(folder);
    for (struct dirent *entry; entries != NULL && (entry = readdir(entries)) != NULL;) {
        if (strstr(entry->d_name, ".so") == NULL || strcmp(entry->d_name, name) == 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        dlopen(path, RTLD_NOW | RTLD_GLOBAL); /* one that cannot be opened is not what was missing, or the next dlopen says so */
    }
    if (entries != NULL)
        closedir(entries);
}

static void *open_library(const char *library)
{
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        char *reason = strdup(dlerror());
        open_neighbours(library);
        handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
        if (handle == NULL)
            fail(MISSING_RUNTIME, "%s: cannot be loaded: %s", library, reason == NULL ? dlerror() : reason);
        free(reason);
    }
    return handle;
}

static AnyFunction find_function(void *handle, const char *name)
{
    AnyFunction function;
    void *symbol = dlsym(handle, name);
    memcpy(&function, &symbol, sizeof function); /* C has no cast from one to the other */
    return function;
}

static int find_name(const char *const *names, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0)
            return (int)i;
    return -1;
}

static void list_names(Json *list, const char *const *names, size_t count)
{
    for (size_t i = 0; i < count; i++)
        fprintf(list->file, "%s%s", i == 0 ? "" : ", ", names[i]);
}

/* Refuses a file that takes something else than tokens, or gives nothing that an inputs file could hold. */
static void check_names(const char *const *inputs, size_t input_count, const char *const *outputs, size_t output_count)
{
    bool known = input_count <= MAX_INPUTS && output_count > 0;
    for (size_t i = 0; known && i < input_count; i++)
        known = find_name(input_names, ENTRIES(input_names), inputs[i]) >= 0;
    known = known && find_name(inputs, input_count, "input_ids") >= 0 && find_name(inputs, input_count, "attention_mask") >= 0;
    if (!known) {
        Json list;
        json_start(&list);
        fputs("inputs ", list.file);
        list_names(&list, inputs, input_count);
        fputs("; outputs ", list.file);
        list_names(&list, outputs, output_count);
        fail(UNREADABLE_MODEL, "%s: %s; needed: input_ids, attention_mask and no more than token_type_ids -> one output", options->model,
             json_finish(&list));
    }
    for (size_t i = 0; i < output_count; i++)
        if (strlen(outputs[i]) >= NAME_BYTES)
            fail(UNREADABLE_MODEL, "%s: output %s: a name may have %d bytes", options->model, outputs[i], NAME_BYTES - 1);
}

static int compare_tensors(const void *left, const void *right)
{
    return strcmp(((const Tensor *)left)->name, ((const Tensor *)right)->name);
}

/* Makes room for the outputs of the model, whose names stay where they are. */
static void name_results(const char *const *outputs, size_t count)
{
    result = (Outputs){count, allocate(count * sizeof *result.tensors)};
    for (size_t i = 0; i < count; i++)
        result.tensors[i] = (Tensor){.name = outputs[i]};
    qsort(result.tensors, count, sizeof *result.tensors, compare_tensors);
}

/* The place of an output in `result`, -1 if it has none. */
static int result_place(const char *name)
{
    for (size_t i = 0; i < result.count; i++)
        if (strcmp(result.tensors[i].name, name) == 0)
            return (int)i;
    return -1;
}

static bool is_result(size_t rank, const int64_t *shape)
{
    return (rank == 2 || rank == 3) && shape[0] == 1 && shape[1] > 0 && (rank == 2 || shape[2] > 0);
}

/* One output of an input of `length` tokens: [1, values] or [1, tokens, width]. */
static void keep_result(size_t place, const float *values, size_t rank, const int64_t *shape, int length)
{
    Tensor *tensor = &result.tensors[place];
    bool per_token = rank == 3 || find_name(per_token_names, ENTRIES(per_token_names), tensor->name) >= 0;
    size_t rows = per_token && shape[1] > length ? (size_t)length : (size_t)shape[1];
    tensor->width = rank == 3 ? (size_t)shape[2] : 0;
    tensor->count = rank == 3 ? rows * tensor->width : rows;
    tensor->values = resize(tensor->values, tensor->count * sizeof *values);
    memcpy(tensor->values, values, tensor->count * sizeof *values);
}

/* --- ONNX Runtime ---------------------------------------------------------------------------------------------------- */

typedef struct OrtEnv OrtEnv;
typedef struct OrtStatus OrtStatus;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorInfo OrtTensorInfo;

enum { ORT_LOG_ERROR = 3, ORT_ARENA_ALLOCATOR = 1, ORT_DEFAULT_MEMORY = 0, ORT_FLOAT = 1, ORT_INT64 = 7 };
enum { ORT_NEWEST_API = 17, ORT_OLDEST_API = 5 }; /* all that is called has been there since version 5 */

typedef struct {
    const AnyFunction *(*get_api)(uint32_t version);
    const char *(*get_version)(void);
} OrtApiBase;

/* place in the table, name, result, parameters */
#define ORT_FUNCTIONS(X)                                                                                                        \
    X(2, GetErrorMessage, const char *, (const OrtStatus *))                                                                    \
    X(3, CreateEnv, OrtStatus *, (int level, const char *name, OrtEnv **))                                                      \
    X(6, DisableTelemetryEvents, OrtStatus *, (const OrtEnv *))                                                                 \
    X(7, CreateSession, OrtStatus *, (const OrtEnv *, const char *path, const OrtSessionOptions *, OrtSession **))              \
    X(9, Run, OrtStatus *,                                                                                                      \
      (OrtSession *, const OrtRunOptions *, const char *const *names, const OrtValue *const *inputs, size_t, const char *const *, \
       size_t, OrtValue **outputs))                                                                                             \
    X(10, CreateSessionOptions, OrtStatus *, (OrtSessionOptions **))                                                            \
    X(16, EnableMemPattern, OrtStatus *, (OrtSessionOptions *))                                                                 \
    X(17, DisableMemPattern, OrtStatus *, (OrtSessionOptions *))                                                                \
    X(18, EnableCpuMemArena, OrtStatus *, (OrtSessionOptions *))                                                                \
    X(19, DisableCpuMemArena, OrtStatus *, (OrtSessionOptions *))                                                               \
    X(22, SetSessionLogSeverityLevel, OrtStatus *, (OrtSessionOptions *, int level))                                            \
    X(23, SetSessionGraphOptimizationLevel, OrtStatus *, (OrtSessionOptions *, int level))                                      \
    X(24, SetIntraOpNumThreads, OrtStatus *, (OrtSessionOptions *, int threads))                                                \
    X(25, SetInterOpNumThreads, OrtStatus *, (OrtSessionOptions *, int threads))                                                \
    X(30, SessionGetInputCount, OrtStatus *, (const OrtSession *, size_t *))                                                    \
    X(31, SessionGetOutputCount, OrtStatus *, (const OrtSession *, size_t *))                                                   \
    X(36, SessionGetInputName, OrtStatus *, (const OrtSession *, size_t place, OrtAllocator *, char **))                        \
    X(37, SessionGetOutputName, OrtStatus *, (const OrtSession *, size_t place, OrtAllocator *, char **))                       \
    X(49, CreateTensorWithDataAsOrtValue, OrtStatus *,                                                                          \
      (const OrtMemoryInfo *, void *data, size_t bytes, const int64_t *shape, size_t rank, int type, OrtValue **))              \
    X(51, GetTensorMutableData, OrtStatus *, (OrtValue *, void **))                                                             \
    X(60, GetTensorElementType, OrtStatus *, (const OrtTensorInfo *, int *type))                                                \
    X(61, GetDimensionsCount, OrtStatus *, (const OrtTensorInfo *, size_t *rank))                                               \
    X(62, GetDimensions, OrtStatus *, (const OrtTensorInfo *, int64_t *shape, size_t rank))                                     \
    X(65, GetTensorTypeAndShape, OrtStatus *, (const OrtValue *, OrtTensorInfo **))                                             \
    X(69, CreateCpuMemoryInfo, OrtStatus *, (int allocator, int memory, OrtMemoryInfo **))                                      \
    X(78, GetAllocatorWithDefaultOptions, OrtStatus *, (OrtAllocator **))                                                       \
    X(93, ReleaseStatus, void, (OrtStatus *))                                                                                   \
    X(96, ReleaseValue, void, (OrtValue *))                                                                                     \
    X(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorInfo *))                                                               \
    X(130, AddSessionConfigEntry, OrtStatus *, (OrtSessionOptions *, const char *key, const char *value))

static struct {
#define ORT_MEMBER(place, name, result_type, parameters) result_type(*name) parameters;
    ORT_FUNCTIONS(ORT_MEMBER)
} ort;

static OrtEnv *ort_env;
static OrtSession *ort_session;
static OrtMemoryInfo *ort_memory;
static const char *ort_inputs[MAX_INPUTS], **ort_outputs; /* outputs in the order of `result` */
static size_t ort_input_count;
static OrtValue **ort_values; /* what the last run gave */

struct Feed {
    OrtValue *values[MAX_INPUTS]; /* ONNX Runtime: tensors over `data` */
    size_t bucket;                /* LiteRT */
    int64_t data[];               /* int64 rows, or int32 rows, in the model's order of inputs */
};

static void ort_check(OrtStatus *status, ErrorKind kind, const char *what)
{
    if (status != NULL)
        fail(kind, "%s: %s: %s", options->model, what, ort.GetErrorMessage(status));
}

static void onnx_open(const ModelOptions *given, char *name, size_t size)
{
    options = given;
    setenv("ORT_DISABLE_TELEMETRY", "1", 1); /* it has an uploader that is there before it can be told to stay quiet */
    void *handle = open_library(options->library);
    const OrtApiBase *(*get_base)(void) = (const OrtApiBase *(*)(void))find_function(handle, onnx_runtime.entry_symbol);
    if (get_base == NULL)
        fail(MISSING_RUNTIME, "%s: no ONNX Runtime: it has no %s", options->library, onnx_runtime.entry_symbol);
    const OrtApiBase *base = get_base();
    const AnyFunction *table = NULL;
    for (uint32_t version = ORT_NEWEST_API; version >= ORT_OLDEST_API && table == NULL; version--)
        table = base->get_api(version);
    if (table == NULL)
        fail(MISSING_RUNTIME, "%s: ONNX Runtime %s has none of the API versions %d to %d; take 1.5 or later", options->library,
             base->get_version(), ORT_OLDEST_API, ORT_NEWEST_API);
#define ORT_ASSIGN(place, name, result_type, parameters) ort.name = (result_type(*) parameters)table[place];
    ORT_FUNCTIONS(ORT_ASSIGN)
    snprintf(name, size, "onnxruntime %s", base->get_version());
    if (options->model == NULL)
        return;
    ort_check(ort.CreateEnv(ORT_LOG_ERROR, "pocketbert", &ort_env), MISSING_RUNTIME, "ONNX Runtime cannot start");
    ort_check(ort.DisableTelemetryEvents(ort_env), MISSING_RUNTIME, "ONNX Runtime's telemetry cannot be switched off");
}

static void onnx_load(const ModelOptions *given)
{
    OrtSessionOptions *session;
    OrtAllocator *allocator;
    size_t output_count;
    const char *what = "an option was refused";
    options = given;
    ort_check(ort.CreateSessionOptions(&session), INTERNAL, what);
    ort_check(ort.SetIntraOpNumThreads(session, options->threads), BAD_JOB, what);
    ort_check(ort.SetInterOpNumThreads(session, 1), INTERNAL, what);
    ort_check(ort.SetSessionGraphOptimizationLevel(session, options->graph_level), BAD_JOB, what);
    ort_check((options->memory_pattern ? ort.EnableMemPattern : ort.DisableMemPattern)(session), INTERNAL, what);
    ort_check((options->memory_arena ? ort.EnableCpuMemArena : ort.DisableCpuMemArena)(session), INTERNAL, what);
    ort_check(ort.SetSessionLogSeverityLevel(session, ORT_LOG_ERROR), INTERNAL, what);
    for (size_t i = 0; i < options->config_count; i++)
        ort_check(ort.AddSessionConfigEntry(session, options->config[i].key, options->config[i].value), BAD_JOB, what);
    what = "cannot be loaded";
    ort_check(ort.CreateSession(ort_env, options->model, session, &ort_session), UNREADABLE_MODEL, what);
    ort_check(ort.GetAllocatorWithDefaultOptions(&allocator), INTERNAL, what);
    ort_check(ort.CreateCpuMemoryInfo(ORT_ARENA_ALLOCATOR, ORT_DEFAULT_MEMORY, &ort_memory), INTERNAL, what);
    ort_check(ort.SessionGetInputCount(ort_session, &ort_input_count), INTERNAL, what);
    ort_check(ort.SessionGetOutputCount(ort_session, &output_count), INTERNAL, what);
    char **inputs = allocate((ort_input_count + 1) * sizeof *inputs), **outputs = allocate((output_count + 1) * sizeof *outputs);
    for (size_t i = 0; i < ort_input_count; i++)
        ort_check(ort.SessionGetInputName(ort_session, i, allocator, &inputs[i]), INTERNAL, what);
    for (size_t i = 0; i < output_count; i++)
        ort_check(ort.SessionGetOutputName(ort_session, i, allocator, &outputs[i]), INTERNAL, what);
    check_names((const char *const *)inputs, ort_input_count, (const char *const *)outputs, output_count);
    memcpy(ort_inputs, inputs, ort_input_count * sizeof *inputs);
    name_results((const char *const *)outputs, output_count);
    ort_outputs = allocate(output_count * sizeof *ort_outputs);
    ort_values = allocate(output_count * sizeof *ort_values);
    for (size_t i = 0; i < output_count; i++) {
        ort_outputs[i] = result.tensors[i].name;
        ort_values[i] = NULL;
    }
}

static int onnx_computed_length(int length)
{
    return length;
}

static Feed *onnx_make_feed(const int32_t *ids, const int32_t *types, int length)
{
    size_t row = (size_t)length;
    int64_t shape[] = {1, length};
    Feed *feed = allocate(sizeof *feed + ort_input_count * row * sizeof *feed->data);
    for (size_t input = 0; input < ort_input_count; input++) {
        int kind = find_name(input_names, ENTRIES(input_names), ort_inputs[input]);
        int64_t *data = feed->data + input * row;
        for (size_t i = 0; i < row; i++)
            data[i] = kind == INPUT_IDS ? ids[i] : kind == ATTENTION_MASK ? 1 : types[i];
        ort_check(ort.CreateTensorWithDataAsOrtValue(ort_memory, data, row * sizeof *data, shape, 2, ORT_INT64, &feed->values[input]),
                  FAILED_INFERENCE, "no tensor could be made");
    }
    return feed;
}

static void onnx_free_feed(Feed *feed)
{
    for (size_t input = 0; input < ort_input_count; input++)
        ort.ReleaseValue(feed->values[input]);
    free(feed);
}

static void onnx_run(const Feed *feed)
{
    OrtStatus *status =
        ort.Run(ort_session, NULL, ort_inputs, (const OrtValue *const *)feed->values, ort_input_count, ort_outputs, result.count, ort_values);
    if (status != NULL)
        ort_check(status, FAILED_INFERENCE, "loaded, but inference failed");
}

static void onnx_keep(size_t place, int length)
{
    OrtTensorInfo *info;
    int type;
    size_t rank;
    int64_t shape[3] = {0};
    void *data;
    const char *what = "its outputs cannot be read";
    ort_check(ort.GetTensorTypeAndShape(ort_values[place], &info), FAILED_INFERENCE, what);
    ort_check(ort.GetTensorElementType(info, &type), FAILED_INFERENCE, what);
    ort_check(ort.GetDimensionsCount(info, &rank), FAILED_INFERENCE, what);
    if (rank <= ENTRIES(shape))
        ort_check(ort.GetDimensions(info, shape, rank), FAILED_INFERENCE, what);
    ort_check(ort.GetTensorMutableData(ort_values[place], &data), FAILED_INFERENCE, what);
    if (type != ORT_FLOAT || !is_result(rank, shape))
        fail(UNREADABLE_MODEL, "%s: %s is not a float32 tensor [1, values] or [1, tokens, width]", options->model, ort_outputs[place]);
    keep_result(place, data, rank, shape, length);
    ort.ReleaseTensorTypeAndShapeInfo(info);
}

static const Outputs *onnx_finish(int length)
{
    for (size_t i = 0; i < result.count; i++) {
        if (length > 0)
            onnx_keep(i, length);
        ort.ReleaseValue(ort_values[i]);
        ort_values[i] = NULL; /* or the next run would write into it */
    }
    return length > 0 ? &result : NULL;
}

const Runtime onnx_runtime = {
    "onnx", "OrtGetApiBase", onnx_open, onnx_load, onnx_computed_length, onnx_make_feed, onnx_free_feed, onnx_run, onnx_finish,
};

/* --- LiteRT ---------------------------------------------------------------------------------------------------------- */

typedef struct LiteRtEnvironmentT *LiteRtEnvironment;
typedef struct LiteRtModelT *LiteRtModel;
typedef struct LiteRtSignatureT *LiteRtSignature;
typedef struct LiteRtTensorT *LiteRtTensor;
typedef struct LiteRtOptionsT *LiteRtOptions;
typedef struct LiteRtOpaqueOptionsT *LiteRtOpaqueOptions;
typedef struct LiteRtCompiledModelT *LiteRtCompiledModel;
typedef struct LiteRtRequirementsT *LiteRtRequirements;
typedef struct LiteRtBufferT *LiteRtBuffer;

enum { LITERT_OK = 0, LITERT_CPU = 1, LITERT_FLOAT32 = 1, LITERT_INT32 = 2, LITERT_READ = 0, LITERT_WRITE = 1, LITERT_LOG_ERROR = 3 };
enum { LITERT_ACCELERATORS_TAG = 24, LITERT_LOG_TAG = 25, LITERT_ANY_INTEGER = 2 };

typedef struct {
    uint32_t element_type;
    uint32_t rank : 7;
    uint32_t has_strides : 1;
    int32_t dimensions[8];
    uint32_t strides[8];
} LiteRtTensorType;

typedef struct {
    int tag;
    struct {
        int type;
        union {
            int64_t integer;
            double real;
            const void *pointer;
        } value;
    } any;
} LiteRtOption;

_Static_assert(sizeof(LiteRtTensorType) == 72, "LiteRT's layout");
_Static_assert(sizeof(LiteRtOption) == 24, "LiteRT's layout");

#define LITERT_FUNCTIONS(X)                                                                                                     \
    X(CreateEnvironment, int, (int count, const LiteRtOption *, LiteRtEnvironment *))                                           \
    X(CreateModelFromFile, int, (LiteRtEnvironment, const char *path, LiteRtModel *))                                           \
    X(CreateOptions, int, (LiteRtOptions *))                                                                                    \
    X(SetOptionsHardwareAccelerators, int, (LiteRtOptions, int accelerators))                                                   \
    X(CreateOpaqueOptions, int, (const char *name, void *text, void (*destroy)(void *), LiteRtOpaqueOptions *))                 \
    X(AddOpaqueOptions, int, (LiteRtOptions, LiteRtOpaqueOptions))                                                              \
    X(CreateCompiledModel, int, (LiteRtEnvironment, LiteRtModel, LiteRtOptions, LiteRtCompiledModel *))                         \
    X(GetNumModelSignatures, int, (LiteRtModel, size_t *))                                                                      \
    X(GetModelSignature, int, (LiteRtModel, size_t place, LiteRtSignature *))                                                   \
    X(GetSignatureKey, int, (LiteRtSignature, const char **))                                                                   \
    X(GetNumSignatureInputs, int, (LiteRtSignature, size_t *))                                                                  \
    X(GetNumSignatureOutputs, int, (LiteRtSignature, size_t *))                                                                 \
    X(GetSignatureInputName, int, (LiteRtSignature, size_t place, const char **))                                               \
    X(GetSignatureOutputName, int, (LiteRtSignature, size_t place, const char **))                                              \
    X(GetSignatureInputTensorByIndex, int, (LiteRtSignature, size_t place, LiteRtTensor *))                                     \
    X(GetSignatureOutputTensorByIndex, int, (LiteRtSignature, size_t place, LiteRtTensor *))                                    \
    X(GetRankedTensorType, int, (LiteRtTensor, LiteRtTensorType *))                                                             \
    X(GetCompiledModelInputBufferRequirements, int, (LiteRtCompiledModel, size_t signature, size_t place, LiteRtRequirements *)) \
    X(GetCompiledModelOutputBufferRequirements, int, (LiteRtCompiledModel, size_t signature, size_t place, LiteRtRequirements *)) \
    X(CreateManagedTensorBufferFromRequirements, int,                                                                           \
      (LiteRtEnvironment, const LiteRtTensorType *, LiteRtRequirements, LiteRtBuffer *))                                        \
    X(LockTensorBuffer, int, (LiteRtBuffer, void **data, int mode))                                                             \
    X(UnlockTensorBuffer, int, (LiteRtBuffer))                                                                                  \
    X(RunCompiledModel, int,                                                                                                    \
      (LiteRtCompiledModel, size_t signature, size_t inputs, LiteRtBuffer *, size_t outputs, LiteRtBuffer *))

static struct {
#define LITERT_MEMBER(name, result_type, parameters) result_type(*name) parameters;
    LITERT_FUNCTIONS(LITERT_MEMBER)
} litert;

static const char signature_prefix[] = "serving_";
static const char litert_marker[] = "LiteRtCreateModelFromFd";

/* An output of one signature, and what its last run gave. */
typedef struct {
    size_t place, rank, bytes; /* place: in `result` */
    int64_t shape[3];
    float *values;
} BucketOutput;

typedef struct {
    size_t signature;
    int length;
    size_t input_count, output_count;
    int kinds[MAX_INPUTS]; /* places in `input_names` */
    LiteRtBuffer inputs[MAX_INPUTS], *outputs;
    BucketOutput *results;
} Bucket;

static LiteRtEnvironment litert_environment;
static LiteRtCompiledModel litert_model;
static Bucket buckets[MAX_BUCKETS]; /* the shortest first */
static size_t bucket_count;
static const Bucket *last_bucket; /* that ran */

/* What LiteRT's numbers mean where a user can do something about it. */
static void litert_check(int status, ErrorKind kind, const char *what)
{
    static const struct {
        int status;
        const char *meaning;
    } meanings[] = {
        {1, "invalid argument"}, {2, "no memory"}, {3, "runtime failure"}, {5, "unsupported"}, {500, "cannot be read, or is no TFLite file"},
        {501, "damaged"}, {504, "does not compile"}, {4000, "made for another version of the runtime"},
    };
    if (status == LITERT_OK)
        return;
    for (size_t i = 0; i < ENTRIES(meanings); i++)
        if (meanings[i].status == status)
            fail(kind, "%s: %s: %s (LiteRT status %d)", options->model, what, meanings[i].meaning, status);
    fail(kind, "%s: %s: LiteRT status %d", options->model, what, status);
}

static void litert_open(const ModelOptions *given, char *name, size_t size)
{
    options = given;
    void *handle = open_library(options->library);
    struct stat file;
    if (find_function(handle, litert_marker) == NULL)
        fail(MISSING_RUNTIME, "%s: no LiteRT of version 2.1.6 or later: it has no %s", options->library, litert_marker);
#define LITERT_ASSIGN(function, result_type, parameters)                                                                        \
    litert.function = (result_type(*) parameters)find_function(handle, "LiteRt" #function);                                     \
    if (litert.function == NULL)                                                                                                \
        fail(MISSING_RUNTIME, "%s: another LiteRT than 2.1.6 to 2.3, the versions this was made for: it has no LiteRt%s",       \
             options->library, #function);
    LITERT_FUNCTIONS(LITERT_ASSIGN)
    /* It does not know its version; its functions tell the release, its size the file. */
    snprintf(name, size, "LiteRT %s (libLiteRt.so of %lld bytes)",
             find_function(handle, "LiteRtBuilderBuildOneHotOpOption") != NULL    ? "2.3 or later"
             : find_function(handle, "LiteRtGetCompiledModelEnvironment") != NULL ? "2.2"
                                                                                  : "2.1",
             stat(options->library, &file) == 0 ? (long long)file.st_size : -1LL);
    if (options->model == NULL)
        return;
    LiteRtOption environment[] = {
        {LITERT_ACCELERATORS_TAG, {LITERT_ANY_INTEGER, {LITERT_CPU}}}, /* it looks for GPU and NPU libraries otherwise */
        {LITERT_LOG_TAG, {LITERT_ANY_INTEGER, {LITERT_LOG_ERROR}}},
    };
    litert_check(litert.CreateEnvironment(ENTRIES(environment), environment, &litert_environment), MISSING_RUNTIME, "LiteRT cannot start");
}

static BucketOutput bucket_output(const LiteRtTensorType *type, const char *name)
{
    BucketOutput output = {.rank = type->rank, .bytes = sizeof *output.values};
    int place = result_place(name);
    for (size_t axis = 0; axis < output.rank && axis < ENTRIES(output.shape); axis++) {
        output.shape[axis] = type->dimensions[axis];
        output.bytes *= (size_t)type->dimensions[axis];
    }
    if (type->element_type != LITERT_FLOAT32 || !is_result(output.rank, output.shape))
        fail(UNREADABLE_MODEL, "%s: %s is not a float32 tensor [1, values] or [1, tokens, width]", options->model, name);
    if (place < 0)
        fail(UNREADABLE_MODEL, "%s: its signatures have different outputs", options->model);
    output.place = (size_t)place;
    output.values = allocate(output.bytes);
    return output;
}

static void read_bucket(LiteRtSignature signature, size_t place, int length)
{
    const char *inputs[MAX_INPUTS + 1], **outputs, *what = "its signatures cannot be read";
    LiteRtTensor tensor;
    LiteRtTensorType type;
    LiteRtRequirements requirements;
    Bucket bucket = {.signature = place, .length = length};
    litert_check(litert.GetNumSignatureInputs(signature, &bucket.input_count), UNREADABLE_MODEL, what);
    litert_check(litert.GetNumSignatureOutputs(signature, &bucket.output_count), UNREADABLE_MODEL, what);
    outputs = allocate((bucket.output_count + 1) * sizeof *outputs);
    bucket.outputs = allocate((bucket.output_count + 1) * sizeof *bucket.outputs);
    bucket.results = allocate((bucket.output_count + 1) * sizeof *bucket.results);
    size_t named = bucket.input_count < ENTRIES(inputs) ? bucket.input_count : ENTRIES(inputs);
    for (size_t i = 0; i < named; i++)
        litert_check(litert.GetSignatureInputName(signature, i, &inputs[i]), UNREADABLE_MODEL, what);
    for (size_t i = 0; i < bucket.output_count; i++)
        litert_check(litert.GetSignatureOutputName(signature, i, &outputs[i]), UNREADABLE_MODEL, what);
    check_names(inputs, named, outputs, bucket.output_count);
    if (bucket_count == 0)
        name_results(outputs, bucket.output_count);
    if (bucket.output_count != result.count)
        fail(UNREADABLE_MODEL, "%s: its signatures have different outputs", options->model);
    what = "no buffer could be made";
    for (size_t i = 0; i < bucket.input_count; i++) {
        bucket.kinds[i] = find_name(input_names, ENTRIES(input_names), inputs[i]);
        litert_check(litert.GetSignatureInputTensorByIndex(signature, i, &tensor), UNREADABLE_MODEL, what);
        litert_check(litert.GetRankedTensorType(tensor, &type), UNREADABLE_MODEL, what);
        if (type.element_type != LITERT_INT32 || type.rank != 2 || type.dimensions[0] != 1 || type.dimensions[1] != length)
            fail(UNREADABLE_MODEL, "%s: %s of %s%d is not int32 [1, %d]", options->model, inputs[i], signature_prefix, length, length);
        litert_check(litert.GetCompiledModelInputBufferRequirements(litert_model, place, i, &requirements), UNREADABLE_MODEL, what);
        litert_check(litert.CreateManagedTensorBufferFromRequirements(litert_environment, &type, requirements, &bucket.inputs[i]),
                     UNREADABLE_MODEL, what);
    }
    for (size_t i = 0; i < bucket.output_count; i++) {
        litert_check(litert.GetSignatureOutputTensorByIndex(signature, i, &tensor), UNREADABLE_MODEL, what);
        litert_check(litert.GetRankedTensorType(tensor, &type), UNREADABLE_MODEL, what);
        bucket.results[i] = bucket_output(&type, outputs[i]);
        litert_check(litert.GetCompiledModelOutputBufferRequirements(litert_model, place, i, &requirements), UNREADABLE_MODEL, what);
        litert_check(litert.CreateManagedTensorBufferFromRequirements(litert_environment, &type, requirements, &bucket.outputs[i]),
                     UNREADABLE_MODEL, what);
    }
    free(outputs);
    size_t at = bucket_count++;
    for (; at > 0 && buckets[at - 1].length > length; at--)
        buckets[at] = buckets[at - 1];
    buckets[at] = bucket;
}

static void litert_load(const ModelOptions *given)
{
    LiteRtModel model;
    LiteRtOptions compilation;
    LiteRtOpaqueOptions cpu;
    size_t signatures;
    char text[128];
    const char *what = "an option was refused";
    options = given;
    litert_check(litert.CreateModelFromFile(litert_environment, options->model, &model), UNREADABLE_MODEL, "cannot be loaded");
    litert_check(litert.CreateOptions(&compilation), INTERNAL, what);
    litert_check(litert.SetOptionsHardwareAccelerators(compilation, LITERT_CPU), INTERNAL, what);
    /* ":memory" is a name that XNNPACK keeps for "no file". */
    snprintf(text, sizeof text, "num_threads = %d\n%s", options->threads,
             options->share_weights ? "weight_cache_file_path = \":memory\"\n" : "");
    litert_check(litert.CreateOpaqueOptions("xnnpack", strdup(text), free, &cpu), INTERNAL, what);
    litert_check(litert.AddOpaqueOptions(compilation, cpu), INTERNAL, what);
    litert_check(litert.CreateCompiledModel(litert_environment, model, compilation, &litert_model), UNREADABLE_MODEL, "cannot be loaded");
    litert_check(litert.GetNumModelSignatures(model, &signatures), UNREADABLE_MODEL, "its signatures cannot be read");
    for (size_t i = 0; i < signatures; i++) {
        LiteRtSignature signature;
        const char *key;
        litert_check(litert.GetModelSignature(model, i, &signature), UNREADABLE_MODEL, "its signatures cannot be read");
        litert_check(litert.GetSignatureKey(signature, &key), UNREADABLE_MODEL, "its signatures cannot be read");
        if (strncmp(key, signature_prefix, strlen(signature_prefix)) != 0)
            continue;
        int length = atoi(key + strlen(signature_prefix));
        if (length < 1 || bucket_count == MAX_BUCKETS)
            fail(UNREADABLE_MODEL, "%s: signature %s is none, or one too many", options->model, key);
        read_bucket(signature, i, length);
    }
    if (bucket_count == 0)
        fail(UNREADABLE_MODEL, "%s: no signature %sN", options->model, signature_prefix);
}

static size_t bucket_of(int length)
{
    for (size_t i = 0; i < bucket_count; i++)
        if (buckets[i].length >= length)
            return i;
    fail(TOO_LONG, "%s: %d tokens do not fit the largest bucket of %d", options->model, length, buckets[bucket_count - 1].length);
}

static int litert_computed_length(int length)
{
    return buckets[bucket_of(length)].length;
}

static Feed *litert_make_feed(const int32_t *ids, const int32_t *types, int length)
{
    size_t place = bucket_of(length);
    const Bucket *bucket = &buckets[place];
    size_t row = (size_t)bucket->length;
    Feed *feed = allocate(sizeof *feed + bucket->input_count * row * sizeof(int32_t));
    feed->bucket = place;
    int32_t *data = (int32_t *)feed->data;
    for (size_t input = 0; input < bucket->input_count; input++, data += row) {
        const int32_t *given = bucket->kinds[input] == INPUT_IDS ? ids : bucket->kinds[input] == TOKEN_TYPE_IDS ? types : NULL;
        for (size_t i = 0; i < row; i++)
            data[i] = i >= (size_t)length ? 0 : given == NULL ? 1 : given[i];
    }
    return feed;
}

/* As an app has to: copy the inputs in, run, copy the outputs out. */
static void litert_run(const Feed *feed)
{
    Bucket *bucket = &buckets[feed->bucket];
    const int32_t *data = (const int32_t *)feed->data;
    size_t row = (size_t)bucket->length;
    void *memory;
    int status = LITERT_OK;
    for (size_t input = 0; status == LITERT_OK && input < bucket->input_count; input++, data += row) {
        status = litert.LockTensorBuffer(bucket->inputs[input], &memory, LITERT_WRITE);
        if (status == LITERT_OK) {
            memcpy(memory, data, row * sizeof *data);
            status = litert.UnlockTensorBuffer(bucket->inputs[input]);
        }
    }
    if (status == LITERT_OK)
        status = litert.RunCompiledModel(litert_model, bucket->signature, bucket->input_count, bucket->inputs, bucket->output_count,
                                         bucket->outputs);
    for (size_t output = 0; status == LITERT_OK && output < bucket->output_count; output++) {
        status = litert.LockTensorBuffer(bucket->outputs[output], &memory, LITERT_READ);
        if (status == LITERT_OK) {
            memcpy(bucket->results[output].values, memory, bucket->results[output].bytes);
            status = litert.UnlockTensorBuffer(bucket->outputs[output]);
        }
    }
    last_bucket = bucket;
    litert_check(status, FAILED_INFERENCE, "loaded, but inference failed");
}

static void litert_free_feed(Feed *feed)
{
    free(feed);
}

static const Outputs *litert_finish(int length)
{
    if (length == 0)
        return NULL;
    for (size_t i = 0; i < last_bucket->output_count; i++) {
        const BucketOutput *output = &last_bucket->results[i];
        keep_result(output->place, output->values, output->rank, output->shape, length);
    }
    return &result;
}

const Runtime litert_runtime = {
    "tflite", "LiteRtCreateEnvironment", litert_open, litert_load, litert_computed_length, litert_make_feed, litert_free_feed,
    litert_run, litert_finish,
};

const Runtime *identify_library(const char *library, char *name, size_t size)
{
    static ModelOptions only_library;
    const Runtime *const known[] = {&onnx_runtime, &litert_runtime};
    void *handle = open_library(library);
    only_library.library = library;
    for (size_t i = 0; i < ENTRIES(known); i++) {
        if (find_function(handle, known[i]->entry_symbol) != NULL) {
            known[i]->open(&only_library, name, size);
            return known[i];
        }
    }
    return NULL;
}
