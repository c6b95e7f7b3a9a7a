/* QEMU plugin (TCG plugin API 1, QEMU 4.2 to 8.2): guest instructions of an A64 program, in total and by class.
 *
 *     qemu-aarch64 -plugin count_instructions.so,out=FILE -cpu cortex-a76 ./program
 *
 * Whenever the guest calls getpriority(0x7a, N), which every kernel refuses without harm, one line goes to FILE:
 *
 *     N total load_store simd dot fma
 *
 * with the instructions executed so far. simd holds every instruction of the SIMD, floating-point and SVE data-processing
 * groups; dot (8-bit integer dot products and matrix multiplications) and fma (fused multiply-adds) are parts of simd.
 *
 * A block of instructions counts when it is entered. What this does not do: count exactly while several threads run (their
 * additions are not atomic; the runner counts with one), count 32-bit instructions, or say how long anything takes.
 *
 * QEMU's packages bring no header, so what is used of its plugin interface is declared here.
 */
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, enum qemu_plugin_op op, void *counter, uint64_t amount);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t,
                                                                               uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

EXPORTED int qemu_plugin_version = 1;

enum { TOTAL, LOAD_STORE, SIMD, DOT, FMA, CLASSES };
enum { GETPRIORITY_A64 = 141, MARK = 0x7a };

static uint64_t executed[CLASSES];
static int out = -1;

struct pattern { uint32_t mask, value; };

static const struct pattern dot_products[] = {
    {0x9fe0fc00, 0x0e809400}, /* SDOT, UDOT (vector) */
    {0xbfe0fc00, 0x0e809c00}, /* USDOT (vector) */
    {0x9fc0f400, 0x0f80e000}, /* SDOT, UDOT (by element) */
    {0xbf40f400, 0x0f00f000}, /* USDOT, SUDOT (by element) */
    {0xdfe0fc00, 0x4e80a400}, /* SMMLA, UMMLA */
    {0xffe0fc00, 0x4e80ac00}, /* USMMLA */
    {0xffe0f800, 0x44800000}, /* SVE SDOT, UDOT (vectors), 8 to 32 bits */
    {0xffe0f800, 0x44a00000}, /* SVE SDOT, UDOT (indexed), 8 to 32 bits */
    {0xffe0fc00, 0x44807800}, /* SVE USDOT (vectors) */
    {0xffe0f800, 0x44a01800}, /* SVE USDOT, SUDOT (indexed) */
    {0xff20fc00, 0x45009800}, /* SVE SMMLA, UMMLA, USMMLA */
};
static const struct pattern fused_multiply_adds[] = {
    {0xff000000, 0x1f000000}, /* FMADD, FMSUB, FNMADD, FNMSUB */
    {0xbf20fc00, 0x0e20cc00}, /* FMLA, FMLS (vector), single and double */
    {0xbf60fc00, 0x0e400c00}, /* FMLA, FMLS (vector), half */
    {0xbf80b400, 0x0f801000}, /* FMLA, FMLS (by element), single and double */
    {0xff80b400, 0x5f801000}, /* the same of scalars */
    {0xbfc0b400, 0x0f001000}, /* FMLA, FMLS (by element), half */
    {0xff200000, 0x65200000}, /* SVE FMLA, FMLS, FMAD, FMSB and their negations */
    {0xff20f800, 0x64200000}, /* SVE FMLA, FMLS (indexed) */
};

static bool matches(uint32_t word, const struct pattern *patterns, size_t count) {
    for (size_t i = 0; i < count; i++)
        if ((word & patterns[i].mask) == patterns[i].value) return true;
    return false;
}
#define MATCHES(word, patterns) matches(word, patterns, sizeof(patterns) / sizeof(patterns[0]))

/* Bits 28..25 tell the group of an A64 instruction: x1x0 loads and stores, x111 SIMD and floating point, 0010 SVE, whose
 * loads and stores have bit 31. */
static void classify(uint32_t word, uint64_t counts[CLASSES]) {
    unsigned group = word >> 25 & 15;
    bool sve = group == 2;
    counts[TOTAL]++;
    if ((group & 5) == 4 || (sve && word >> 31)) {
        counts[LOAD_STORE]++;
    } else if ((group & 7) == 7 || sve) {
        counts[SIMD]++;
        counts[DOT] += MATCHES(word, dot_products);
        counts[FMA] += MATCHES(word, fused_multiply_adds);
    }
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    (void)id;
    uint64_t counts[CLASSES] = {0};
    size_t n = qemu_plugin_tb_n_insns(block);
    for (size_t i = 0; i < n; i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        classify(word, counts);
    }
    for (int i = 0; i < CLASSES; i++)
        if (counts[i]) qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &executed[i], counts[i]);
}

static void on_syscall(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5,
                       uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)cpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != GETPRIORITY_A64 || a1 != MARK) return;
    char line[160];
    int length = snprintf(line, sizeof line, "%llu", (unsigned long long)a2);
    for (int i = 0; i < CLASSES; i++) length += snprintf(line + length, sizeof line - length, " %llu", (unsigned long long)executed[i]);
    line[length++] = '\n';
    if (write(out, line, length) != length) _exit(1); /* a missing line would pass for a shorter run */
}

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
    (void)info;
    if (argc != 1 || strncmp(argv[0], "out=", 4) != 0) {
        fprintf(stderr, "count_instructions: one argument, out=FILE, is needed\n");
        return 1;
    }
    out = open(argv[0] + 4, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
    if (out < 0) {
        perror(argv[0] + 4);
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    return 0;
}
