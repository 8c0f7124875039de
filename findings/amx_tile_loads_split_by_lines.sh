#!/usr/bin/env bash
# A tile of AMX loads six times slower from rows that are not aligned to 64 bytes, where NumPy aligns arrays to 16.
#
# Versions:  numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6; an Intel Xeon with AMX.
# Behaviour: TILELOADD reads 16 rows of up to 64 bytes. Each row that crosses a cache line costs far more than two lines:
#            a whole tile takes 50 cycles instead of 8, and a product that loads a tile for each multiplication runs at a
#            third of its speed. The manuals give one number for the instruction. The first element of an array of NumPy
#            is 16 bytes past a page where it is large, so that the usual "just take the array" is the slow case.
# Seen:      nanoseconds a tile of 1 KiB from the first cache, 8 tiles in turn
#            aligned 2.2, shifted by 16 bytes 14.2, shifted by 32 bytes 14.2
#            a shifted load takes at least 3 times as long: yes
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
grep -qw amx_bf16 /proc/cpuinfo || skip "the processor has no AMX"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6 || skip "the packages cannot be installed"

cat >loads.py <<'PY'
import ctypes
import time

import numpy
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

if ctypes.CDLL(None).syscall(158, 0x1023, 18):  # arch_prctl(ARCH_REQ_XCOMP_PERM, tile data)
    raise SystemExit(77)
byte, word = ir.IntType(8), ir.IntType(64)


def called(builder, name, arguments):
    kind = ir.FunctionType(ir.VoidType(), [one.type for one in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, arguments)


def address(context, builder, signature, values):
    data = context.make_array(signature.args[0])(context, builder, values[0]).data
    return builder.bitcast(data, byte.as_pointer())


@intrinsic
def configure(typing, array):
    def write(context, builder, signature, values):
        called(builder, "llvm.x86.ldtilecfg", [address(context, builder, signature, values)])
        return context.get_dummy_value()

    return types.void(array), write


@intrinsic
def load_tiles(typing, array):
    def write(context, builder, signature, values):
        start = address(context, builder, signature, values)
        for tile in range(8):
            place = builder.gep(start, [word(1024 * tile)])
            called(builder, "llvm.x86.tileloadd64", [byte(tile), place, word(64)])
        return context.get_dummy_value()

    return types.void(array), write


@njit
def load(configuration, array, times):
    configure(configuration)
    for _ in range(times):
        load_tiles(array)


configuration = numpy.zeros(64, numpy.uint8)
configuration[0], configuration[16:32:2], configuration[48:56] = 1, 64, 16
memory = numpy.ones(1 << 16, numpy.uint8)
aligned = memory[-memory.ctypes.data % 4096 :]
seconds = {}
for shift in (0, 16, 32):
    load(configuration, aligned[shift:], 10)
    seconds[shift] = numpy.inf
    for _ in range(9):
        began = time.thread_time()
        load(configuration, aligned[shift:], 20_000)
        seconds[shift] = min(seconds[shift], time.thread_time() - began)
shown = {shift: f"{1e9 * value / 8 / 20_000:.1f}" for shift, value in seconds.items()}
print("nanoseconds a tile of 1 KiB from the first cache, 8 tiles in turn")
print(f"aligned {shown[0]}, shifted by 16 bytes {shown[16]}, shifted by 32 bytes {shown[32]}")
slow = min(seconds[16], seconds[32]) > 3 * seconds[0]
print("a shifted load takes at least 3 times as long:", "yes" if slow else "no")
if not slow:
    raise SystemExit("changed: loads that are not aligned are no longer slow")
PY
code=0
timeout 120 env/bin/python loads.py || code=$?
[ "$code" != 77 ] || skip "the kernel refuses tile data"
exit "$code"
