/* JSON, and what the machine says of itself: cores, clocks, heat, battery, memory. A signal that cannot be read is null.
 *
 * What this does not do: change any of it; ask twice; know more than the files under the root say.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "runner.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <gnu/libc-version.h>
#endif

#define PATH_SIZE 512
#define MAX_CORES CPU_SETSIZE

static const char *const isa_flags[] = {
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "sme",
};

/* --- JSON ---------------------------------------------------------------------------------------------------------- */

void json_start(Json *json)
{
    *json = (Json){0};
    json->file = open_memstream(&json->text, &json->size);
    if (json->file == NULL)
        fail(OUT_OF_MEMORY, "no memory for the answer");
}

const char *json_finish(Json *json)
{
    if (fclose(json->file) != 0)
        fail(OUT_OF_MEMORY, "no memory for the answer");
    return json->text;
}

static void separate(Json *json)
{
    if (json->comma)
        fputc(',', json->file);
    json->comma = true;
}

void json_open(Json *json, char bracket)
{
    separate(json);
    fputc(bracket, json->file);
    json->comma = false;
}

void json_close(Json *json, char bracket)
{
    fputc(bracket, json->file);
    json->comma = true;
}

Json *json_key(Json *json, const char *key)
{
    json_text(json, key);
    fputc(':', json->file);
    json->comma = false;
    return json;
}

/* The character that starts at *text, which moves past it; U+FFFD for one byte that is no UTF-8. */
static uint32_t next_character(const unsigned char **text)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char first = *(*text)++;
    size_t length = first < 0x80 ? 1 : (first & 0xE0) == 0xC0 ? 2 : (first & 0xF0) == 0xE0 ? 3 : (first & 0xF8) == 0xF0 ? 4 : 0;
    if (length == 1)
        return first;
    uint32_t character = length == 0 ? 0 : first & (0x7FU >> length);
    for (size_t i = 1; i < length; i++) {
        if (((*text)[i - 1] & 0xC0) != 0x80)
            return 0xFFFD;
        character = character << 6 | ((*text)[i - 1] & 0x3F);
    }
    if (length == 0 || character < least[length] || character > 0x10FFFF || (character >= 0xD800 && character < 0xE000))
        return 0xFFFD;
    *text += length - 1;
    return character;
}

/* ASCII alone comes out, whatever terminal or shell carries it. */
void json_text(Json *json, const char *text)
{
    if (text == NULL) {
        json_null(json);
        return;
    }
    separate(json);
    fputc('"', json->file);
    for (const unsigned char *at = (const unsigned char *)text; *at != '\0';) {
        uint32_t character = next_character(&at);
        if (character == '"' || character == '\\')
            fprintf(json->file, "\\%c", (int)character);
        else if (character >= 0x20 && character < 0x7F)
            fputc((int)character, json->file);
        else if (character < 0x10000)
            fprintf(json->file, "\\u%04x", (unsigned)character);
        else
            fprintf(json->file, "\\u%04x\\u%04x", 0xD800 + (unsigned)((character - 0x10000) >> 10), 0xDC00 + (unsigned)(character & 0x3FF));
    }
    fputc('"', json->file);
}

void json_integer(Json *json, long long value)
{
    separate(json);
    fprintf(json->file, "%lld", value);
}

void json_number(Json *json, double value, int decimals)
{
    if (!isfinite(value)) { /* JSON has no word for it */
        json_null(json);
        return;
    }
    separate(json);
    fprintf(json->file, "%.*f", decimals, value);
}

void json_bool(Json *json, bool value)
{
    separate(json);
    fputs(value ? "true" : "false", json->file);
}

void json_null(Json *json)
{
    separate(json);
    fputs("null", json->file);
}

void json_raw(Json *json, const char *members)
{
    separate(json);
    fputs(members, json->file);
}

void json_value(Json *json, Number number)
{
    if (number.known)
        json_integer(json, number.value);
    else
        json_null(json);
}

/* --- files --------------------------------------------------------------------------------------------------------- */

/* The whole text of a file, to be freed; NULL where the machine has no such file or keeps it to itself. */
static char *read_text(const char *root, const char *path)
{
    char full[2 * PATH_SIZE];
    if (snprintf(full, sizeof full, "%s/%s", root, path) >= (int)sizeof full)
        return NULL;
    FILE *file = fopen(full, "re");
    if (file == NULL)
        return NULL;
    size_t used = 0, size = 4096;
    char *text = allocate(size);
    for (size_t got; (got = fread(text + used, 1, size - used - 1, file)) > 0;) {
        used += got;
        if (used + 1 == size)
            text = resize(text, size *= 2);
    }
    bool failed = ferror(file) != 0;
    fclose(file);
    if (failed) {
        free(text);
        return NULL;
    }
    text[used] = '\0'; /* what follows a zero byte is cut off: device trees end their texts with one */
    return text;
}

/* Without blanks at its ends; NULL if nothing is left. */
static char *read_line(const char *root, const char *path)
{
    char *text = read_text(root, path);
    if (text == NULL)
        return NULL;
    size_t start = strspn(text, " \n"), end = strlen(text);
    while (end > start && strchr(" \n", text[end - 1]) != NULL)
        end--;
    memmove(text, text + start, end - start);
    text[end - start] = '\0';
    if (end == start) {
        free(text);
        return NULL;
    }
    return text;
}

/* Unknown for text, and for 0 unless that is an answer: drivers write it for "not known". */
static Number read_number(const char *root, const char *path, int base, bool zero)
{
    Number number = {0};
    char *text = read_line(root, path), *end = text;
    if (text != NULL) {
        errno = 0;
        number.value = strtoll(text, &end, base);
        number.known = end != text && *end == '\0' && errno == 0 && (zero || number.value != 0);
    }
    free(text);
    return number;
}

Number read_field(const char *root, const char *file, const char *word, long long unit)
{
    Number number = {0};
    size_t length = strlen(word);
    char *text = read_text(root, file), *rest = text;
    for (char *line; text != NULL && !number.known && (line = strsep(&rest, "\n")) != NULL;)
        if (strncmp(line, word, length) == 0)
            number = (Number){true, strtoll(line + length, NULL, 10) * unit};
    free(text);
    return number;
}

static bool in_path(const char *program)
{
    const char *path = getenv("PATH");
    char *copy = path == NULL ? NULL : strdup(path), *rest = copy, full[PATH_SIZE];
    bool found = false;
    for (char *folder; copy != NULL && !found && (folder = strsep(&rest, ":")) != NULL;)
        found = snprintf(full, sizeof full, "%s/%s", folder, program) < (int)sizeof full && access(full, X_OK) == 0;
    free(copy);
    return found;
}

Number read_dumpsys_pss(void)
{
    Number number = {0};
    char command[64], line[256];
    if (!in_path("dumpsys"))
        return number;
    snprintf(command, sizeof command, "dumpsys meminfo %d", (int)getpid());
    FILE *output = popen(command, "r");
    if (output == NULL)
        return number;
    while (fgets(line, sizeof line, output) != NULL) {
        const char *found = strstr(line, "TOTAL PSS:");
        if (found != NULL && !number.known)
            number = (Number){true, strtoll(found + strlen("TOTAL PSS:"), NULL, 10) * 1024};
    }
    pclose(output);
    return number;
}

/* --- lists --------------------------------------------------------------------------------------------------------- */

static int compare_ints(const void *left, const void *right)
{
    int a = *(const int *)left, b = *(const int *)right;
    return (a > b) - (a < b);
}

static int compare_texts(const void *left, const void *right)
{
    return strcmp(*(char *const *)left, *(char *const *)right);
}

/* Numbers n of the entries "<prefix>n" of a folder, in order. */
static size_t numbered_entries(const char *root, const char *folder, const char *prefix, int *numbers, size_t size)
{
    char full[2 * PATH_SIZE];
    size_t count = 0, length = strlen(prefix);
    snprintf(full, sizeof full, "%s/%s", root, folder);
    DIR *entries = opendir(full);
    for (struct dirent *entry; entries != NULL && (entry = readdir(entries)) != NULL;) {
        const char *digits = entry->d_name + length;
        if (strncmp(entry->d_name, prefix, length) == 0 && *digits != '\0' && strspn(digits, "0123456789") == strlen(digits) && count < size)
            numbers[count++] = atoi(digits);
    }
    if (entries != NULL)
        closedir(entries);
    qsort(numbers, count, sizeof *numbers, compare_ints);
    return count;
}

typedef struct {
    int numbers[MAX_CORES];
    size_t count;
} Cores;

static Cores *read_cores(const char *root)
{
    Cores *cores = allocate(sizeof *cores);
    cores->count = numbered_entries(root, "sys/devices/system/cpu", "cpu", cores->numbers, MAX_CORES);
    return cores;
}

static Number core_number(const char *root, int core, const char *file)
{
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "sys/devices/system/cpu/cpu%d/%s", core, file);
    return read_number(root, path, 10, false);
}

/* What each core says in a file, as a text or a number; null if no core says anything. */
static void write_of_cores(Json *json, const char *root, const Cores *cores, const char *file, bool as_text)
{
    Number *numbers = allocate((cores->count + 1) * sizeof *numbers);
    char **texts = allocate((cores->count + 1) * sizeof *texts), path[PATH_SIZE];
    bool any = false;
    for (size_t i = 0; i < cores->count; i++) {
        snprintf(path, sizeof path, "sys/devices/system/cpu/cpu%d/%s", cores->numbers[i], file);
        texts[i] = as_text ? read_line(root, path) : NULL;
        numbers[i] = as_text ? (Number){texts[i] != NULL, 0} : read_number(root, path, 10, false);
        any = any || numbers[i].known;
    }
    if (any) {
        json_open(json, '[');
        for (size_t i = 0; i < cores->count; i++) {
            if (as_text)
                json_text(json, texts[i]);
            else
                json_value(json, numbers[i]);
            free(texts[i]);
        }
        json_close(json, ']');
    } else {
        json_null(json);
    }
    free(numbers);
    free(texts);
}

/* --- clusters: cores that are alike, by capacity where the kernel gives it for all, else by highest clock ------------ */

typedef struct {
    Cores *cores;
    long long strengths[MAX_CORES]; /* of each core */
    long long levels[MAX_CORES];    /* the different strengths, the weakest first */
    size_t level_count;             /* 0: the machine does not say */
} Clusters;

static int compare_levels(const void *left, const void *right)
{
    long long a = *(const long long *)left, b = *(const long long *)right;
    return (a > b) - (a < b);
}

static Clusters *read_clusters(const char *root)
{
    static const char *const files[] = {"cpu_capacity", "cpufreq/cpuinfo_max_freq"};
    Clusters *found = allocate(sizeof *found);
    found->cores = read_cores(root);
    found->level_count = 0;
    for (size_t file = 0; file < ENTRIES(files) && found->level_count == 0; file++) {
        size_t count = found->cores->count, known = 0;
        for (; known < count; known++) {
            Number strength = core_number(root, found->cores->numbers[known], files[file]);
            if (!strength.known)
                break;
            found->strengths[known] = found->levels[known] = strength.value;
        }
        if (known < count || count == 0)
            continue;
        qsort(found->levels, count, sizeof *found->levels, compare_levels);
        for (size_t i = 0; i < count; i++)
            if (i == 0 || found->levels[i] != found->levels[found->level_count - 1])
                found->levels[found->level_count++] = found->levels[i];
    }
    return found;
}

static void free_clusters(Clusters *clusters)
{
    free(clusters->cores);
    free(clusters);
}

static void write_clusters(Json *json, const char *root)
{
    Clusters *clusters = read_clusters(root);
    if (clusters->level_count == 0)
        json_null(json);
    else
        json_open(json, '[');
    for (size_t level = 0; level < clusters->level_count; level++) {
        int first = -1;
        json_open(json, '{');
        json_open(json_key(json, "cores"), '[');
        for (size_t i = 0; i < clusters->cores->count; i++) {
            if (clusters->strengths[i] == clusters->levels[level]) {
                json_integer(json, clusters->cores->numbers[i]);
                first = first < 0 ? clusters->cores->numbers[i] : first;
            }
        }
        json_close(json, ']');
        json_value(json_key(json, "capacity"), core_number(root, first, "cpu_capacity"));
        json_value(json_key(json, "max_frequency_khz"), core_number(root, first, "cpufreq/cpuinfo_max_freq"));
        json_close(json, '}');
    }
    if (clusters->level_count != 0)
        json_close(json, ']');
    free_clusters(clusters);
}

size_t named_cores(const char *root, const char *name, int *cores, size_t size, const char **reason)
{
    Clusters *clusters = read_clusters(root);
    size_t count = 0;
    if (clusters->level_count < 2) {
        *reason = clusters->level_count == 0 ? "the machine does not say which those are" : "all cores are alike here";
    } else {
        long long wanted = clusters->levels[strcmp(name, "big") == 0 ? clusters->level_count - 1 : 0];
        for (size_t i = 0; i < clusters->cores->count && count < size; i++)
            if (clusters->strengths[i] == wanted)
                cores[count++] = clusters->cores->numbers[i];
    }
    free_clusters(clusters);
    return count;
}

/* --- what does not change ------------------------------------------------------------------------------------------- */

static char *trimmed(char *text)
{
    text += strspn(text, " \t\r");
    for (size_t end = strlen(text); end > 0 && strchr(" \t\r", text[end - 1]) != NULL; end--)
        text[end - 1] = '\0';
    return text;
}

typedef struct {
    char **texts;
    size_t count;
} List;

static void append(List *list, const char *text)
{
    list->texts = resize(list->texts, (list->count + 1) * sizeof *list->texts);
    list->texts[list->count] = strdup(text);
    if (list->texts[list->count++] == NULL)
        fail(OUT_OF_MEMORY, "no memory for the conditions");
}

static void free_list(List *list)
{
    for (size_t i = 0; i < list->count; i++)
        free(list->texts[i]);
    free(list->texts);
}

/* The values of one key of /proc/cpuinfo, which has a block for each core. */
static List cpu_values(const char *root, const char *wanted)
{
    List values = {0};
    char *text = read_text(root, "proc/cpuinfo"), *rest = text;
    for (char *line; text != NULL && (line = strsep(&rest, "\n")) != NULL;) {
        char *key = strsep(&line, ":");
        if (line != NULL && strcmp(trimmed(key), wanted) == 0 && *trimmed(line) != '\0')
            append(&values, trimmed(line));
    }
    free(text);
    return values;
}

/* Different names once each, in order; "implementer I part P" where a core has no name. */
static void write_cpu_model(Json *json, const char *root)
{
    List names = cpu_values(root, "model name");
    if (names.count == 0) {
        List implementers = cpu_values(root, "CPU implementer"), parts = cpu_values(root, "CPU part");
        char name[PATH_SIZE];
        for (size_t i = 0; i < implementers.count && i < parts.count; i++) {
            snprintf(name, sizeof name, "implementer %s part %s", implementers.texts[i], parts.texts[i]);
            append(&names, name);
        }
        free_list(&implementers);
        free_list(&parts);
    }
    Json joined;
    json_start(&joined);
    if (names.count > 0)
        qsort(names.texts, names.count, sizeof *names.texts, compare_texts);
    for (size_t i = 0; i < names.count; i++)
        if (i == 0 || strcmp(names.texts[i], names.texts[i - 1]) != 0)
            fprintf(joined.file, "%s%s", i == 0 ? "" : " + ", names.texts[i]);
    const char *text = json_finish(&joined);
    json_text(json, *text == '\0' ? NULL : text);
    free(joined.text);
    free_list(&names);
}

static void write_isa(Json *json, const char *root)
{
    List flags = cpu_values(root, "flags");
    if (flags.count == 0)
        flags = cpu_values(root, "Features");
    if (flags.count == 0) {
        json_null(json);
        return;
    }
    json_open(json, '[');
    for (size_t i = 0; i < ENTRIES(isa_flags); i++) {
        size_t length = strlen(isa_flags[i]);
        for (const char *at = flags.texts[0]; (at = strstr(at, isa_flags[i])) != NULL; at += length) {
            if ((at == flags.texts[0] || at[-1] == ' ') && (at[length] == ' ' || at[length] == '\0')) {
                json_text(json, isa_flags[i]);
                break;
            }
        }
    }
    json_close(json, ']');
    free_list(&flags);
}

static void write_affinity(Json *json)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) {
        json_null(json);
        return;
    }
    json_open(json, '[');
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &set))
            json_integer(json, core);
    json_close(json, ']');
}

void write_conditions(Json *json, const char *root, const char *runtime)
{
    Cores *cores = read_cores(root);
    char *board = read_line(root, "sys/firmware/devicetree/base/model"), kernel[sizeof(struct utsname)];
    struct utsname machine = {0};
    bool named = uname(&machine) == 0;
    write_cpu_model(json_key(json, "cpu_model"), root);
    json_text(json_key(json, "board"), board);
    json_text(json_key(json, "architecture"), named ? machine.machine : NULL);
    write_isa(json_key(json, "isa"), root);
    json_key(json, "cores");
    if (cores->count > 0)
        json_open(json, '[');
    for (size_t i = 0; i < cores->count; i++)
        json_integer(json, cores->numbers[i]);
    if (cores->count > 0)
        json_close(json, ']');
    else
        json_null(json);
    write_of_cores(json_key(json, "capacities"), root, cores, "cpu_capacity", false);
    write_of_cores(json_key(json, "governors"), root, cores, "cpufreq/scaling_governor", true);
    write_of_cores(json_key(json, "max_frequencies_khz"), root, cores, "cpufreq/scaling_max_freq", false);
    write_clusters(json_key(json, "clusters"), root);
    write_affinity(json_key(json, "affinity"));
    json_value(json_key(json, "memory_total_bytes"), read_field(root, "proc/meminfo", "MemTotal:", 1024));
    snprintf(kernel, sizeof kernel, "%s %s", machine.sysname, machine.release);
    json_text(json_key(json, "kernel"), named ? kernel : NULL);
    json_key(json, "libc");
#if defined(__GLIBC__)
    char libc[64];
    snprintf(libc, sizeof libc, "glibc %s", gnu_get_libc_version());
    json_text(json, libc);
#elif defined(__BIONIC__)
    json_text(json, "bionic");
#else
    json_null(json);
#endif
    json_text(json_key(json, "agent"), AGENT);
    json_null(json_key(json, "python"));
    json_null(json_key(json, "numpy"));
    json_text(json_key(json, "runtime"), runtime);
    free(board);
    free(cores);
}

/* --- what changes ---------------------------------------------------------------------------------------------------- */

/* What each device of a kind says, under the name that its driver gives it; devices of one name are told apart by number. */
static void write_by_type(Json *json, const char *root, const char *kind, const char *file, bool temperature)
{
    int numbers[256];
    char path[PATH_SIZE], label[2 * PATH_SIZE];
    size_t count = numbered_entries(root, "sys/class/thermal", kind, numbers, ENTRIES(numbers));
    List labels = {0};
    if (count == 0) {
        json_null(json);
        return;
    }
    json_open(json, '{');
    for (size_t i = 0; i < count; i++) {
        snprintf(path, sizeof path, "sys/class/thermal/%s%d/type", kind, numbers[i]);
        char *type = read_line(root, path);
        if (type == NULL)
            snprintf(label, sizeof label, "%s%d", kind, numbers[i]);
        else
            snprintf(label, sizeof label, "%s", type);
        for (size_t other = 0; other < labels.count; other++) {
            if (strcmp(labels.texts[other], label) == 0) {
                size_t length = strlen(label);
                snprintf(label + length, sizeof label - length, " %s%d", kind, numbers[i]);
            }
        }
        append(&labels, label);
        free(type);
        json_key(json, label);
        snprintf(path, sizeof path, "sys/class/thermal/%s%d/%s", kind, numbers[i], file);
        Number value = read_number(root, path, 10, !temperature);
        if (value.known && temperature)
            json_number(json, (double)value.value / 1000, 3);
        else
            json_value(json, value);
    }
    json_close(json, '}');
    free_list(&labels);
}

static void write_battery(Json *json, const char *root)
{
    char path[2 * PATH_SIZE];
    List supplies = {0};
    snprintf(path, sizeof path, "%s/sys/class/power_supply", root);
    DIR *entries = opendir(path);
    for (struct dirent *entry; entries != NULL && (entry = readdir(entries)) != NULL;)
        if (entry->d_name[0] != '.')
            append(&supplies, entry->d_name);
    if (entries != NULL)
        closedir(entries);
    if (supplies.count > 0)
        qsort(supplies.texts, supplies.count, sizeof *supplies.texts, compare_texts);
    bool found = false;
    for (size_t i = 0; i < supplies.count && !found; i++) {
        static const struct {
            const char *key, *file;
            bool zero;
        } numbers[] = {{"capacity_percent", "capacity", true}, {"current_ua", "current_now", true}, {"voltage_uv", "voltage_now", false}};
        snprintf(path, sizeof path, "sys/class/power_supply/%s/type", supplies.texts[i]);
        char *type = read_line(root, path);
        found = type != NULL && strcmp(type, "Battery") == 0;
        free(type);
        if (!found)
            continue;
        json_open(json, '{');
        for (size_t number = 0; number < ENTRIES(numbers); number++) {
            snprintf(path, sizeof path, "sys/class/power_supply/%s/%s", supplies.texts[i], numbers[number].file);
            json_value(json_key(json, numbers[number].key), read_number(root, path, 10, numbers[number].zero));
        }
        snprintf(path, sizeof path, "sys/class/power_supply/%s/status", supplies.texts[i]);
        char *status = read_line(root, path);
        json_text(json_key(json, "status"), status);
        free(status);
        json_close(json, '}');
    }
    if (!found)
        json_null(json);
    free_list(&supplies);
}

/* The share of the last 10 s in which something waited, in percent. */
static void write_pressure(Json *json, const char *root)
{
    static const char *const kinds[] = {"cpu", "memory"};
    char path[2 * PATH_SIZE];
    struct stat folder;
    snprintf(path, sizeof path, "%s/proc/pressure", root);
    if (stat(path, &folder) != 0 || !S_ISDIR(folder.st_mode)) {
        json_null(json);
        return;
    }
    json_open(json, '{');
    for (size_t i = 0; i < ENTRIES(kinds); i++) {
        snprintf(path, sizeof path, "proc/pressure/%s", kinds[i]);
        char *text = read_text(root, path);
        double share = 0;
        json_key(json, kinds[i]);
        if (text != NULL && sscanf(text, "some avg10=%lf", &share) == 1)
            json_number(json, share, 2);
        else
            json_null(json);
        free(text);
    }
    json_close(json, '}');
}

void write_state(Json *json, const char *root, bool brief)
{
    Cores *cores = read_cores(root);
    if (!brief) {
        double load[3];
        char *text = read_line(root, "proc/loadavg");
        json_open(json, '{');
        json_key(json, "loadavg");
        if (text != NULL && sscanf(text, "%lf %lf %lf", &load[0], &load[1], &load[2]) == 3) {
            json_open(json, '[');
            for (int i = 0; i < 3; i++)
                json_number(json, load[i], 2);
            json_close(json, ']');
        } else {
            json_null(json);
        }
        free(text);
    }
    write_by_type(json_key(json, "temperatures_c"), root, "thermal_zone", "temp", true);
    write_of_cores(json_key(json, "frequencies_khz"), root, cores, "cpufreq/scaling_cur_freq", false);
    if (!brief) {
        json_value(json_key(json, "throttled"), read_number(root, "sys/devices/platform/soc/soc:firmware/get_throttled", 16, true));
        write_by_type(json_key(json, "cooling"), root, "cooling_device", "cur_state", false);
        write_battery(json_key(json, "battery"), root);
        write_pressure(json_key(json, "pressure"), root);
        json_close(json, '}');
    }
    free(cores);
}
