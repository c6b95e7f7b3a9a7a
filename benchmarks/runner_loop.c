/* What an app's own code in C sees: a model loaded once, one input again and again, the clock read around batches alone.
 *
 *   runner_loop MODEL INPUTS WARMUP BATCHES INFERENCES
 *
 * Linked to the runtime, compiled with -DONNX or -DTFLITE; shares nothing with the runner that it is compared with. Prints
 * {"batch_mean_ns": [...], "peak_bytes": N}. Anything that goes wrong ends it with a word on standard error and exit code 1.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void check(int ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "runner_loop: %s failed\n", what);
        exit(1);
    }
}

enum { MOST_OUTPUTS = 8 };
static volatile float sink;

/* What an input of the model holds at place i of its `length` tokens. */
static int32_t token(const char *name, const int32_t *ids, const int32_t *types, int i)
{
    return strcmp(name, "input_ids") == 0 ? ids[i] : strcmp(name, "attention_mask") == 0 ? 1 : types[i];
}

#ifdef ONNX
/* Places in ONNX Runtime's table of functions, in which nothing ever moves. */
enum { CREATE_ENV = 3, NO_TELEMETRY = 6, CREATE_SESSION = 7, RUN = 9, CREATE_OPTIONS = 10, INTRA = 24, INTER = 25, INPUTS = 30, OUTPUTS = 31 };
enum { INPUT_NAME = 36, OUTPUT_NAME = 37, TENSOR = 49, DATA = 51, CPU_MEMORY = 69, ALLOCATOR = 78, RELEASE_VALUE = 96 };
struct base {
    void *const *(*get_api)(uint32_t);
};
const struct base *OrtGetApiBase(void);
static void *const *api;
static void *session, *inputs[3], *outputs[MOST_OUTPUTS];
static char *input_names[3], *output_names[MOST_OUTPUTS];
static size_t input_count, output_count;
static void *(*run)(void *, void *, char *const *, void *const *, size_t, char *const *, size_t, void **);
static void *(*get_data)(void *, void **);
static void (*release)(void *);

#define CALL(place, types, ...) check(((void *(*)types)api[place])(__VA_ARGS__) == NULL, #place)

static void load(const char *model, const int32_t *ids, const int32_t *types, int length)
{
    void *env, *options, *memory, *allocator;
    int64_t shape[] = {1, length};
    api = OrtGetApiBase()->get_api(5);
    check(api != NULL, "OrtGetApiBase");
    CALL(CREATE_ENV, (int, const char *, void **), 3, "loop", &env);
    CALL(NO_TELEMETRY, (void *), env);
    CALL(CREATE_OPTIONS, (void **), &options);
    CALL(INTRA, (void *, int), options, 1);
    CALL(INTER, (void *, int), options, 1);
    CALL(CREATE_SESSION, (void *, const char *, void *, void **), env, model, options, &session);
    CALL(ALLOCATOR, (void **), &allocator);
    CALL(CPU_MEMORY, (int, int, void **), 1, 0, &memory);
    CALL(INPUTS, (void *, size_t *), session, &input_count);
    CALL(OUTPUTS, (void *, size_t *), session, &output_count);
    check(output_count <= MOST_OUTPUTS, "counting outputs");
    for (size_t output = 0; output < output_count; output++)
        CALL(OUTPUT_NAME, (void *, size_t, void *, char **), session, output, allocator, &output_names[output]);
    for (size_t input = 0; input < input_count && input < 3; input++) {
        int64_t *row = calloc((size_t)length, sizeof *row);
        CALL(INPUT_NAME, (void *, size_t, void *, char **), session, input, allocator, &input_names[input]);
        for (int i = 0; i < length; i++)
            row[i] = token(input_names[input], ids, types, i);
        CALL(TENSOR, (void *, void *, size_t, int64_t *, size_t, int, void **), memory, row, (size_t)length * sizeof *row, shape, (size_t)2, 7, &inputs[input]);
    }
    run = (void *(*)(void *, void *, char *const *, void *const *, size_t, char *const *, size_t, void **))api[RUN];
    get_data = (void *(*)(void *, void **))api[DATA];
    release = (void (*)(void *))api[RELEASE_VALUE];
}

static void infer(void)
{
    float *values;
    memset(outputs, 0, sizeof outputs);
    check(run(session, NULL, input_names, inputs, input_count, output_names, output_count, outputs) == NULL, "Run");
    for (size_t output = 0; output < output_count; output++) {
        check(get_data(outputs[output], (void **)&values) == NULL, "GetTensorMutableData");
        sink = values[0];
        release(outputs[output]);
    }
}
#else
struct tensor_type {
    int32_t words[18];
};
struct option {
    int64_t tag, type, value;
};
int LiteRtCreateEnvironment(int, const struct option *, void **);
int LiteRtCreateModelFromFile(void *, const char *, void **);
int LiteRtCreateOptions(void **);
int LiteRtSetOptionsHardwareAccelerators(void *, int);
int LiteRtCreateOpaqueOptions(const char *, void *, void (*)(void *), void **);
int LiteRtAddOpaqueOptions(void *, void *);
int LiteRtCreateCompiledModel(void *, void *, void *, void **);
int LiteRtGetNumModelSignatures(void *, size_t *);
int LiteRtGetModelSignature(void *, size_t, void **);
int LiteRtGetSignatureKey(void *, const char **);
int LiteRtGetNumSignatureInputs(void *, size_t *);
int LiteRtGetNumSignatureOutputs(void *, size_t *);
int LiteRtGetSignatureInputName(void *, size_t, const char **);
int LiteRtGetSignatureInputTensorByIndex(void *, size_t, void **);
int LiteRtGetSignatureOutputTensorByIndex(void *, size_t, void **);
int LiteRtGetRankedTensorType(void *, struct tensor_type *);
int LiteRtGetCompiledModelInputBufferRequirements(void *, size_t, size_t, void **);
int LiteRtGetCompiledModelOutputBufferRequirements(void *, size_t, size_t, void **);
int LiteRtCreateManagedTensorBufferFromRequirements(void *, const struct tensor_type *, void *, void **);
int LiteRtLockTensorBuffer(void *, void **, int);
int LiteRtUnlockTensorBuffer(void *);
int LiteRtRunCompiledModel(void *, size_t, size_t, void **, size_t, void **);
static void *compiled, *inputs[3], *outputs[MOST_OUTPUTS];
static int32_t *rows[3];
static float *results[MOST_OUTPUTS];
static size_t chosen, input_count, output_count, row_bytes, result_bytes[MOST_OUTPUTS];

#define CALL(name, ...) check(LiteRt##name(__VA_ARGS__) == 0, #name)

static void load(const char *model_path, const int32_t *ids, const int32_t *types, int length)
{
    void *environment, *model, *options, *cpu, *signature, *chosen_signature = NULL, *tensor, *requirements;
    struct tensor_type type;
    size_t signatures;
    int bucket = 0;
    const struct option only_cpu[] = {{24, 2, 1}, {25, 2, 3}};
    CALL(CreateEnvironment, 2, only_cpu, &environment);
    CALL(CreateModelFromFile, environment, model_path, &model);
    CALL(CreateOptions, &options);
    CALL(SetOptionsHardwareAccelerators, options, 1);
    CALL(CreateOpaqueOptions, "xnnpack", strdup("num_threads = 1\nweight_cache_file_path = \":memory\"\n"), free, &cpu);
    CALL(AddOpaqueOptions, options, cpu);
    CALL(CreateCompiledModel, environment, model, options, &compiled);
    CALL(GetNumModelSignatures, model, &signatures);
    for (size_t i = 0; i < signatures; i++) {
        const char *key;
        CALL(GetModelSignature, model, i, &signature);
        CALL(GetSignatureKey, signature, &key);
        int holds = atoi(key + strlen("serving_"));
        if (holds >= length && (bucket == 0 || holds < bucket)) {
            bucket = holds;
            chosen = i;
            chosen_signature = signature;
        }
    }
    check(bucket > 0, "finding a bucket");
    row_bytes = (size_t)bucket * sizeof(int32_t);
    CALL(GetNumSignatureInputs, chosen_signature, &input_count);
    for (size_t input = 0; input < input_count && input < 3; input++) {
        const char *name;
        CALL(GetSignatureInputName, chosen_signature, input, &name);
        rows[input] = calloc(1, row_bytes);
        for (int i = 0; i < length; i++)
            rows[input][i] = token(name, ids, types, i);
        CALL(GetSignatureInputTensorByIndex, chosen_signature, input, &tensor);
        CALL(GetRankedTensorType, tensor, &type);
        CALL(GetCompiledModelInputBufferRequirements, compiled, chosen, input, &requirements);
        CALL(CreateManagedTensorBufferFromRequirements, environment, &type, requirements, &inputs[input]);
    }
    CALL(GetNumSignatureOutputs, chosen_signature, &output_count);
    check(output_count <= MOST_OUTPUTS, "counting outputs");
    for (size_t output = 0; output < output_count; output++) {
        CALL(GetSignatureOutputTensorByIndex, chosen_signature, output, &tensor);
        CALL(GetRankedTensorType, tensor, &type);
        CALL(GetCompiledModelOutputBufferRequirements, compiled, chosen, output, &requirements);
        CALL(CreateManagedTensorBufferFromRequirements, environment, &type, requirements, &outputs[output]);
        result_bytes[output] = sizeof(float);
        for (int axis = 0; axis < (type.words[1] & 0x7f); axis++) /* the element type, the rank, the dimensions */
            result_bytes[output] *= (size_t)type.words[2 + axis];
        results[output] = malloc(result_bytes[output]);
    }
}

static void infer(void)
{
    void *memory;
    for (size_t input = 0; input < input_count; input++) {
        CALL(LockTensorBuffer, inputs[input], &memory, 1);
        memcpy(memory, rows[input], row_bytes);
        CALL(UnlockTensorBuffer, inputs[input]);
    }
    CALL(RunCompiledModel, compiled, chosen, input_count, inputs, output_count, outputs);
    for (size_t output = 0; output < output_count; output++) {
        CALL(LockTensorBuffer, outputs[output], &memory, 0);
        memcpy(results[output], memory, result_bytes[output]);
        CALL(UnlockTensorBuffer, outputs[output]);
        sink = results[output][0];
    }
}
#endif

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static long peak_bytes(void)
{
    char line[256];
    long kilobytes = 0;
    FILE *status = fopen("/proc/self/status", "r");
    check(status != NULL, "reading /proc/self/status");
    while (fgets(line, sizeof line, status) != NULL)
        sscanf(line, "VmHWM: %ld", &kilobytes);
    fclose(status);
    return kilobytes * 1024;
}

int main(int count, char **arguments)
{
    /* "PBI3", one input, no outputs, where it begins and ends, its ids, their types */
    int32_t words[4096];
    check(count == 6, "the command line");
    FILE *file = fopen(arguments[2], "rb");
    size_t read = file == NULL ? 0 : fread(words, sizeof *words, 4096, file);
    check(read > 5 && memcmp(words, "PBI3", 4) == 0 && words[1] == 1 && words[2] == 0 && read == 5 + 2 * (size_t)words[4], "reading one input");
    fclose(file);
    long warmup = atol(arguments[3]), batches = atol(arguments[4]), inferences = atol(arguments[5]);
    load(arguments[1], words + 5, words + 5 + words[4], words[4]);
    for (long i = 0; i < warmup; i++)
        infer();
    printf("{\"batch_mean_ns\": [");
    for (long batch = 0; batch < batches; batch++) {
        int64_t start = now_ns();
        for (long i = 0; i < inferences; i++)
            infer();
        printf("%s%.1f", batch == 0 ? "" : ", ", (double)(now_ns() - start) / (double)inferences);
    }
    printf("], \"peak_bytes\": %ld}\n", peak_bytes());
    fflush(stdout);
    _Exit(0); /* the runtimes' destructors are not what is measured */
}
