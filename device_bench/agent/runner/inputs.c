/* Inputs files (agent.py says what is in them): read with every size checked, written, and held against what a model gives. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "runner.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char magic[] = "PBI3";

/* --- reading --------------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *path;
    size_t bytes;
    const int32_t *words;
    uint64_t count, at;
} Words;

static _Noreturn void refuse(const Words *file, const char *reason)
{
    fail(BAD_JOB, "%s: %zu bytes that are no inputs file: %s", file->path, file->bytes, reason);
}

static const int32_t *take(Words *file, int64_t count)
{
    if (count < 0 || (uint64_t)count > file->count - file->at)
        refuse(file, "the file is too short");
    const int32_t *taken = file->words + file->at;
    file->at += (uint64_t)count;
    return taken;
}

/* Where `count` stretches begin, and where the last one ends. */
static const int32_t *take_offsets(Words *file, int32_t count)
{
    const int32_t *offsets = take(file, (int64_t)count + 1);
    bool rise = offsets[0] == 0;
    for (int32_t i = 0; rise && i < count; i++)
        rise = offsets[i + 1] > offsets[i];
    if (!rise)
        refuse(file, "offsets do not rise from 0");
    return offsets;
}

static const char *take_name(Words *file)
{
    const char *name = (const char *)take(file, NAME_BYTES / (int)sizeof(int32_t));
    size_t length = strnlen(name, NAME_BYTES);
    bool valid = length > 0 && length < NAME_BYTES;
    for (size_t i = length; valid && i < NAME_BYTES; i++)
        valid = name[i] == '\0';
    if (!valid)
        refuse(file, "an output has no name");
    return name;
}

static Words read_words(const char *path)
{
    FILE *file = fopen(path, "re");
    struct stat facts;
    if (file == NULL || fstat(fileno(file), &facts) != 0)
        fail(BAD_JOB, "%s: no inputs can be read: %s", path, strerror(errno));
    size_t bytes = (size_t)facts.st_size;
    int32_t *words = allocate(bytes + sizeof *words);
    if (fread(words, 1, bytes, file) != bytes)
        fail(BAD_JOB, "%s: no inputs can be read: %s", path, ferror(file) ? strerror(errno) : "it became shorter");
    fclose(file);
    return (Words){.path = path, .bytes = bytes, .words = words, .count = bytes / sizeof *words};
}

Inputs read_inputs(const char *path)
{
    Words file = read_words(path);
    if (file.bytes % sizeof(int32_t) != 0 || memcmp(take(&file, 1), magic, sizeof(int32_t)) != 0)
        refuse(&file, "it is none of version 3");
    const int32_t *counts = take(&file, 2);
    Inputs inputs = {.count = counts[0]};
    if (counts[0] < 1 || counts[1] < 0)
        refuse(&file, "it has no inputs");
    inputs.offsets = take_offsets(&file, inputs.count);
    inputs.ids = take(&file, inputs.offsets[inputs.count]);
    inputs.types = take(&file, inputs.offsets[inputs.count]);
    inputs.output_count = (size_t)counts[1];
    for (size_t i = 0; i < inputs.output_count; i++) { /* room for one more at a time: the file may lie about their number */
        const char *name = take_name(&file);
        inputs.outputs = resize(inputs.outputs, (i + 1) * sizeof *inputs.outputs);
        Output *output = &inputs.outputs[i];
        output->name = name;
        int32_t width = *take(&file, 1);
        output->offsets = take_offsets(&file, inputs.count);
        bool in_order = width >= 0 && (i == 0 || strcmp(inputs.outputs[i - 1].name, output->name) < 0);
        for (int number = 0; in_order && width > 0 && number < inputs.count; number++)
            in_order = output->offsets[number + 1] % width == 0;
        if (!in_order)
            refuse(&file, "its outputs are out of order");
        output->width = (size_t)width;
        output->values = (const float *)take(&file, output->offsets[inputs.count]);
    }
    if (file.at != file.count)
        refuse(&file, "the file is too long");
    return inputs;
}

int input_length(const Inputs *inputs, int number)
{
    return inputs->offsets[number + 1] - inputs->offsets[number];
}

/* --- golden outputs -------------------------------------------------------------------------------------------------- */

static void print_shape(char *text, size_t size, size_t count, size_t width)
{
    if (width > 0)
        snprintf(text, size, "[%zu, %zu]", count / width, width);
    else
        snprintf(text, size, "[%zu]", count);
}

static const Tensor *find_tensor(const Outputs *outputs, const char *name)
{
    for (size_t i = 0; i < outputs->count; i++)
        if (strcmp(outputs->tensors[i].name, name) == 0)
            return &outputs->tensors[i];
    return NULL;
}

void check_outputs(const char *model, const Outputs *got, const Inputs *golden, int number, double tolerance)
{
    char given[64], needed[64];
    for (size_t i = 0; i < golden->output_count; i++) {
        const Output *output = &golden->outputs[i];
        const float *expected = output->values + output->offsets[number];
        size_t count = (size_t)(output->offsets[number + 1] - output->offsets[number]);
        const Tensor *tensor = find_tensor(got, output->name);
        if (tensor == NULL)
            fail(WRONG_OUTPUT, "%s: golden case %d differs: there is no output %s", model, number + 1, output->name);
        if (tensor->width != output->width || tensor->count != count) {
            print_shape(given, sizeof given, tensor->count, tensor->width);
            print_shape(needed, sizeof needed, count, output->width);
            fail(WRONG_OUTPUT, "%s: golden case %d differs in %s: its shape is %s, not %s", model, number + 1, output->name, given, needed);
        }
        double worst = 0;
        for (size_t value = 0; !isnan(worst) && value < count; value++) {
            double difference = fabsf(tensor->values[value] - expected[value]);
            worst = isnan(difference) || difference > worst ? difference : worst;
        }
        if (!(worst <= tolerance))
            fail(WRONG_OUTPUT, "%s: golden case %d differs by %.4g in %s, at most %.4g is allowed", model, number + 1, worst, output->name, tolerance);
    }
}

/* --- writing --------------------------------------------------------------------------------------------------------- */

void collect_outputs(const char *model, Collected *collected, const Outputs *got, int number, int inputs)
{
    if (collected->outputs == NULL) {
        collected->count = got->count;
        collected->outputs = allocate((got->count + 1) * sizeof *collected->outputs);
        for (size_t i = 0; i < got->count; i++) {
            collected->outputs[i] = (CollectedOutput){.name = got->tensors[i].name, .width = got->tensors[i].width};
            collected->outputs[i].offsets = allocate(((size_t)inputs + 1) * sizeof(int32_t));
            collected->outputs[i].offsets[0] = 0;
        }
    }
    for (size_t i = 0; i < got->count; i++) {
        CollectedOutput *output = &collected->outputs[i];
        const Tensor *tensor = &got->tensors[i];
        size_t before = (size_t)output->offsets[number];
        if (tensor->width != output->width)
            fail(UNREADABLE_MODEL, "%s: output %s is not of one width for every input", model, output->name);
        if (tensor->count > INT32_MAX - before)
            fail(BAD_JOB, "%s: output %s has more values than a file can hold", model, output->name);
        if (before + tensor->count > output->size) {
            output->size = 2 * (before + tensor->count);
            output->values = resize(output->values, output->size * sizeof *output->values);
        }
        memcpy(output->values + before, tensor->values, tensor->count * sizeof *tensor->values);
        output->offsets[number + 1] = (int32_t)(before + tensor->count);
    }
}

void write_collected(FILE *file, const Inputs *inputs, const Collected *collected)
{
    int32_t counts[] = {inputs->count, (int32_t)collected->count};
    size_t offsets = (size_t)inputs->count + 1, tokens = (size_t)inputs->offsets[inputs->count];
    fwrite(magic, 1, sizeof(int32_t), file);
    fwrite(counts, sizeof *counts, ENTRIES(counts), file);
    fwrite(inputs->offsets, sizeof(int32_t), offsets, file);
    fwrite(inputs->ids, sizeof(int32_t), tokens, file);
    fwrite(inputs->types, sizeof(int32_t), tokens, file);
    for (size_t i = 0; i < collected->count; i++) {
        const CollectedOutput *output = &collected->outputs[i];
        char name[NAME_BYTES] = "";
        int32_t width = (int32_t)output->width;
        memcpy(name, output->name, strlen(output->name)); /* a longer one was refused when the model was loaded */
        fwrite(name, 1, sizeof name, file);
        fwrite(&width, sizeof width, 1, file);
        fwrite(output->offsets, sizeof(int32_t), offsets, file);
        fwrite(output->values, sizeof *output->values, (size_t)output->offsets[inputs->count], file);
    }
}
