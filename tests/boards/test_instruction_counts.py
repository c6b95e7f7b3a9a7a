"""The plugin that counts guest instructions, held against programs of which every instruction is known."""

from __future__ import annotations

import subprocess

import pytest

from device_bench.targets.qemu import CLASSES, read_counts
from runtimes.errors import BadInput, IntegrityError

INSTRUCTIONS = {
    "others": """
        add x3, x3, 1 | nop | mul x3, x4, x4 | cmp x3, x4 | b 1f | 1: adr x5, memory | msub x3, x4, x4, x3""",
    "loads and stores": """
        ldr x3, [sp] | ldp x3, x4, [sp] | stp x3, x4, [x9, 32] | ldr q0, [sp] | st1 {v0.4s}, [x9] | ld4 {v0.4s-v3.4s}, [x9] | ldadd x3,
        x4, [x9]""",
    "SIMD and floating point": """
        add v0.4s, v1.4s, v2.4s | fadd s0, s1, s2 | fmul v0.4s, v1.4s, v2.4s | mla v0.4s, v1.4s, v2.4s | smlal v0.4s, v1.4h, v2.4h | fcmla
        v0.4s, v1.4s, v2.4s, 90 | fcmla v0.4s, v1.4s, v2.s[0], 90 | bfdot v0.4s, v1.8h, v2.8h""",
    "dot products": """
        sdot v0.4s, v1.16b, v2.16b | udot v0.2s, v1.8b, v2.8b | sdot v0.4s, v1.16b, v2.4b[3] | udot v0.4s, v1.16b, v2.4b[1] | usdot v0.4s,
        v1.16b, v2.16b | usdot v0.4s, v1.16b, v2.4b[2] | sudot v0.4s, v1.16b, v2.4b[2] | smmla v0.4s, v1.16b, v2.16b | ummla v0.4s,
        v1.16b, v2.16b | usmmla v0.4s, v1.16b, v2.16b""",
    "fused multiply-adds": """
        fmadd s0, s1, s2, s3 | fnmsub d0, d1, d2, d3 | fmla v0.4s, v1.4s, v2.4s | fmls v0.2d, v1.2d, v2.2d | fmla v0.8h, v1.8h, v2.8h |
        fmls v0.4h, v1.4h, v2.4h | fmla v0.4s, v1.4s, v2.s[3] | fmls v0.2d, v1.2d, v2.d[1] | fmla v0.8h, v1.8h, v2.h[7] | fmla s0, s1,
        v2.s[1]""",
    "SVE loads and stores": """
        ld1w z0.s, p0/z, [x9] | st1w z0.s, p0, [x9] | ld1rqb z0.b, p0/z, [x9]""",
    "SVE": """
        ptrue p0.b | add z0.s, z1.s, z2.s | fmul z0.s, p0/m, z0.s, z1.s | mla z0.s, p0/m, z1.s, z2.s | sdot z0.d, z1.h, z2.h""",
    "SVE dot products": """
        sdot z0.s, z1.b, z2.b | udot z0.s, z1.b, z2.b | sdot z0.s, z1.b, z2.b[3] | usdot z0.s, z1.b, z2.b | usdot z0.s, z1.b, z2.b[1] |
        sudot z0.s, z1.b, z2.b[1] | smmla z0.s, z1.b, z2.b | usmmla z0.s, z1.b, z2.b""",
    "SVE fused multiply-adds": """
        fmla z0.s, p0/m, z1.s, z2.s | fmls z0.h, p0/m, z1.h, z2.h | fmad z0.d, p0/m, z1.d, z2.d | fnmls z0.s, p0/m, z1.s, z2.s | fmla
        z0.s, z1.s, z2.s[1] | fmls z0.h, z1.h, z2.h[5]""",
}
CLASSES_OF = {
    "others": (), "loads and stores": ("load_store",), "SIMD and floating point": ("simd",), "dot products": ("simd", "dot"),
    "fused multiply-adds": ("simd", "fma"), "SVE loads and stores": ("load_store",), "SVE": ("simd",), "SVE dot products": ("simd", "dot"),
    "SVE fused multiply-adds": ("simd", "fma"),
}  # fmt: skip
PROGRAM = """
.arch armv8.6-a+sve2+i8mm+bf16+fp16+lse
.globl _start
_start:
    sub sp, sp, 256
    adr x9, memory
    ptrue p0.b
    mov x8, 141; mov x0, 0x7a; mov x1, 0; svc 0
    mov x10, {times}
again:
    {body}
    subs x10, x10, 1
    b.ne again
    mov x8, 141; mov x0, 0x7a; mov x1, 1; svc 0
    mov x8, 94; mov x0, 0; svc 0
.data
.balign 64
memory: .zero 4096
"""
LOOP, AROUND = 2, 5
"""Instructions of the loop itself, and those once before and after it between the marks."""


@pytest.fixture
def count(aarch64, tmp_path):
    """Counts of a loop around some instructions, each separated by |."""

    def count_body(body: str, times: int, cpu: str = "max") -> dict[str, int]:
        source, program, counts = (tmp_path / name for name in ("program.s", "program", "counts, of a program"))
        source.write_text(PROGRAM.format(body="\n".join(" ".join(line.split()) for line in body.split("|")), times=times))
        subprocess.run([str(aarch64.compiler), "-nostdlib", "-static", "-o", str(program), str(source)], check=True)
        subprocess.run(aarch64.command(cpu, [str(program)], counts), check=True)
        (found,) = read_counts(counts, 1, "test")
        return found

    return count_body


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_every_instruction_is_counted_once_and_in_its_class(count, kind, times):
    written = len(INSTRUCTIONS[kind].split("|"))
    expected = dict.fromkeys(CLASSES, 0) | {"total": times * (written + LOOP) + AROUND}
    assert count(INSTRUCTIONS[kind], times) == expected | dict.fromkeys(CLASSES_OF[kind], times * written)


def test_all_together_and_again(count):
    body = "|".join(INSTRUCTIONS.values())
    assert count(body, 100) == count(body, 100)


def test_missing_marks_are_no_count(tmp_path):
    path = tmp_path / "counts"
    with pytest.raises(IntegrityError, match=r"q: 0 marks of the instruction counter for 1 inputs"):
        read_counts(path, 1, "q")
    path.write_text("0 5 1 1 0 0\n1 9 1 1 0 0\n2 10 1 1 0 0\n")
    with pytest.raises(IntegrityError, match=r"q: 3 marks of the instruction counter for 2 inputs"):
        read_counts(path, 2, "q")


def test_no_such_cpu(aarch64):
    with pytest.raises(BadInput, match=r"qemu:cortex-x9: no such CPU; there are cortex-a53, cortex-a72, cortex-a76, max"):
        aarch64.command("cortex-x9", ["program"])
