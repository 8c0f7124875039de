#!/usr/bin/env bash
# With the settings of malloc that are recommended for HPC, aligned memory that was freed is not used again.
#
# Versions:  glibc 2.36 (Debian 12); Linux x86_64. Python calls the C library, without any package.
# Behaviour: MALLOC_MMAP_MAX_=0 with a large MALLOC_TRIM_THRESHOLD_ keeps freed memory with the process, so that large
#            arrays need not be mapped, and filled with zeros by the system, again and again. That works for malloc, by
#            which NumPy takes its arrays: one block serves all. posix_memalign, by which PyTorch takes its tensors on
#            the processor, leaves a gap at each block that it aligns, and the next block of the same size does not fit
#            into what was freed: the process grows to five to seven times the block.
# Seen:      (blocks of 84 MiB, 40 times, each freed before the next is taken)
#            malloc           84 MiB more at the end
#            posix_memalign  420 to 588 MiB more at the end
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the behaviour was seen on Linux x86_64 only"
version=$(getconf GNU_LIBC_VERSION 2>/dev/null) || skip "the C library is not glibc"
echo "$version"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat >"$work/probe.py" <<'PY'
import ctypes
import os
import sys

library, size = ctypes.CDLL(None), 84 << 20
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


before = resident()
for _ in range(40):
    block = ctypes.c_void_p()
    if sys.argv[1] == "malloc":
        block.value = library.malloc(size)
    else:
        assert library.posix_memalign(ctypes.byref(block), 64, size) == 0
    library.memset(block, 1, size)
    library.free(block)
print(resident() - before)
PY

changed=0
expect() { # expect LEAST MOST FUNCTION
  local found
  found=$(MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 python3 "$work/probe.py" "$3")
  printf '%-15s %4s MiB more at the end\n' "$3" "$found"
  { [ "$found" -ge "$1" ] && [ "$found" -le "$2" ]; } || changed=1
}
expect 60 120 malloc
expect 300 1000 posix_memalign
if [ "$changed" = 1 ]; then
  echo "changed: memory is not used again as described"
  exit 1
fi
