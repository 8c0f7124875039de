#!/usr/bin/env bash
# VDPBF16PS, the dot product of bfloat16 pairs, computes half as much as float32's multiply-add on an Intel Xeon.
#
# Versions:  numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6; an Intel Xeon with AVX512-BF16 and AMX.
# Behaviour: The instruction does twice the operations of a float32 multiply-add of the same width, but a core of this
#            processor starts one in two cycles, and two multiply-adds in each. A program that goes by the flag
#            avx512_bf16 is slower by it than with float32, where it does not use AMX (whose tiles reach 15 times as
#            much). AMD's processors with the same flag gain; only measuring tells.
# Seen:      GFLOP/s of one core, 16 independent sums in registers
#            float32 multiply-add 246, bfloat16 pairs 123
#            the pairs are slower: yes
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
grep -qw avx512_bf16 /proc/cpuinfo || skip "the processor has no AVX512-BF16"
grep -qw amx_bf16 /proc/cpuinfo || skip "this is about Intel's processors with AMX, too"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6 || skip "the packages cannot be installed"

cat >sums.py <<'PY'
import time

import numpy
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SUMS, ROUNDS = 16, 5_000_000
floats = ir.VectorType(ir.FloatType(), 16)


class BrainFloat(ir.Type):
    def _to_string(self):
        return "bfloat"


pairs = ir.VectorType(BrainFloat(), 32)


def function(builder, name, result, arguments):
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def multiply_add(builder, total, factor):
    name = "llvm.fma.v16f32"
    return builder.call(function(builder, name, floats, [floats] * 3), [factor, factor, total])


def dot(builder, total, factor):
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    both = builder.bitcast(factor, pairs)
    return builder.call(function(builder, name, floats, [floats, pairs, pairs]), [total, both, both])


def chains(instruction):
    @intrinsic
    def run(typing, sample, rounds):
        def write(context, builder, signature, values):
            word = ir.IntType(64)
            single = builder.insert_element(ir.Constant(floats, ir.Undefined), values[0], ir.IntType(32)(0))
            order = ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
            factor = builder.shuffle_vector(single, single, order)
            before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(body)
            builder.position_at_end(body)
            count, sums = builder.phi(word), [builder.phi(floats) for _ in range(SUMS)]
            results = [instruction(builder, total, factor) for total in sums]
            following = builder.add(count, word(1))
            count.add_incoming(word(0), before)
            count.add_incoming(following, body)
            for total, result in zip(sums, results):
                total.add_incoming(factor, before)
                total.add_incoming(result, body)
            builder.cbranch(builder.icmp_signed("<", following, values[1]), body, after)
            builder.position_at_end(after)
            whole = results[0]
            for result in results[1:]:
                whole = builder.fadd(whole, result)
            return builder.extract_element(whole, ir.IntType(32)(0))

        return types.float32(types.float32, types.int64), write

    return njit(lambda sample, rounds: run(sample, rounds))


speed = {}
for name, instruction, operations in (("multiply-add", multiply_add, 32), ("pairs", dot, 64)):
    sums = chains(instruction)
    sums(numpy.float32(0), 10)
    best = numpy.inf
    for _ in range(7):
        began = time.thread_time()
        sums(numpy.float32(0), ROUNDS)
        best = min(best, time.thread_time() - began)
    speed[name] = operations * SUMS * ROUNDS / best / 1e9
print(f"GFLOP/s of one core, {SUMS} independent sums in registers")
print(f"float32 multiply-add {speed['multiply-add']:.0f}, bfloat16 pairs {speed['pairs']:.0f}")
slower = speed["pairs"] < 0.8 * speed["multiply-add"]
print("the pairs are slower:", "yes" if slower else "no")
if not slower:
    raise SystemExit("changed: pairs of bfloat16 are no longer slower than float32")
PY
timeout 120 env/bin/python sums.py
