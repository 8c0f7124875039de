"""What is done when the processor finds no byte behind an address: it must not call Python, nor take memory."""

from __future__ import annotations

import mmap

import numpy as np
from llvmlite import binding  # type: ignore[import-untyped]

_SIGNAL_ADDRESS = 16
"""Byte of the `siginfo_t` of 64-bit Linux at which the address of a fault is."""
_MAP_FIXED = 0x10
_HANDLER = """
declare ptr @mmap(ptr, i64, i32, i32, i32, i64)
declare i32 @sigaction(i32, ptr, ptr)

define void @on_bus_error(i32 %number, ptr %info, ptr %context) {{
begin:
  %where = getelementptr i8, ptr %info, i64 {address}
  %address = load i64, ptr %where
  br label %next
next:
  %entry = phi i64 [ {table}, %begin ], [ %following, %other ]
  %following = add i64 %entry, 24
  %over = icmp eq i64 %entry, {end}
  br i1 %over, label %foreign, label %look
look:
  %first_at = inttoptr i64 %entry to ptr
  %last_at = getelementptr i64, ptr %first_at, i64 1
  %first = load volatile i64, ptr %first_at
  %last = load volatile i64, ptr %last_at
  %behind = icmp uge i64 %address, %first
  %before = icmp ult i64 %address, %last
  %inside = and i1 %behind, %before
  br i1 %inside, label %own, label %other
other:
  br label %next
own:
  %masked = and i64 %address, -{page}
  %page = inttoptr i64 %masked to ptr
  %mapped = call ptr @mmap(ptr %page, i64 {page}, i32 {read}, i32 {flags}, i32 -1, i64 0)
  %is_there = icmp eq ptr %mapped, %page
  br i1 %is_there, label %note, label %foreign
note:
  %noted = getelementptr i64, ptr %first_at, i64 2
  store volatile i64 1, ptr %noted
  ret void
foreign:
  %restored = call i32 @sigaction(i32 %number, ptr inttoptr (i64 {previous} to ptr), ptr null)
  ret void
}}
"""


class Handler:
    """A handler of SIGBUS, as ``sigaction`` takes it with SA_SIGINFO.

    A fault in one of the ranges of a table is noted there, and a page of zeros is put in its place.  Any other fault
    is left to the handler before: that one is restored, and called when the access is tried again.

    Parameters
    ----------
    table : (n, 3) int64 array
        Of each range, its first address, the one behind its last, and what becomes 1 with a fault.  It must stay where
        it is.
    previous
        Address of the ``struct sigaction`` of the handler before.

    Attributes
    ----------
    address : int
        Of the function.
    """

    def __init__(self, table: np.ndarray, previous: int) -> None:
        start = table.ctypes.data
        text = _HANDLER.format(
            address=_SIGNAL_ADDRESS,
            table=start,
            end=start + table.nbytes,
            page=mmap.PAGESIZE,
            read=mmap.PROT_READ,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED,
            previous=previous,
        )
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine()
        self._code = binding.create_mcjit_compiler(binding.parse_assembly(text), machine)
        self._code.finalize_object()
        self.address: int = self._code.get_function_address("on_bus_error")
