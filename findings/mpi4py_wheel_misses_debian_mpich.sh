#!/usr/bin/env bash
# mpi4py's wheel does not find Debian's MPICH, although the library is compatible: Debian names it differently.
#
# Versions:  mpi4py 4.1.2 from the wheel; libmpich12 of Debian (4.0.2-3+b1 on bookworm); x86_64.
# Behaviour: the wheel works with each library of the MPICH ABI, which it loads as libmpi.so.12 (or libmpi.so, or
#            libmpi.so.40 for Open MPI). Debian and Ubuntu name theirs libmpich.so.12, so the import ends with "cannot
#            load MPI library" with MPICH installed. MPI4PY_LIBMPI=libmpich.so.12 is not enough: the library is
#            recognised, but the extension itself is linked to libmpi.so.12 and fails to load. A link named libmpi.so.12
#            to Debian's file, in a folder of LD_LIBRARY_PATH, is enough.
# Seen:      as installed: RuntimeError: cannot load MPI library
#            with MPI4PY_LIBMPI=libmpich.so.12: ImportError: libmpi.so.12: cannot open shared object file: No such file or directory
#            with a link libmpi.so.12: MPICH Version:	4.0.2
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
command -v apt-get >/dev/null && command -v dpkg >/dev/null || skip "this is no Debian: apt-get and dpkg are needed"
[ "$(uname -m)" = x86_64 ] || skip "the behaviour was seen on x86_64 only"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cd "$work"
# Unpacked, not installed. The packages are those on which libmpich12 depends beyond the C library.
packages=(libmpich12 libhwloc15 libucx0 libgfortran5)
timeout 120 apt-get -qq download "${packages[@]}" 2>/dev/null ||
  skip "apt-get cannot download ${packages[*]} (perhaps apt-get update comes first)"
for package in ./*.deb; do dpkg -x "$package" root; done
library=$(find "$work/root" -name libmpich.so.12 -print -quit)
[ -n "$library" ] || skip "libmpich12 does not contain libmpich.so.12"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install mpi4py==4.1.2 || skip "the packages cannot be installed"
mkdir link
ln -s "$library" link/libmpi.so.12
folders=$(dirname "$library")
unset MPI4PY_MPIABI MPI4PY_LIBMPI

cat >probe.py <<'PY'
try:
    from mpi4py import MPI
except Exception as error:
    print(f"{type(error).__name__}: {error}".splitlines()[0])
else:
    print(MPI.Get_library_version().splitlines()[0])
PY
changed=0
show() { # show TEXT PATTERN VARIABLE=VALUE...
  local text=$1 pattern=$2 seen
  shift 2
  seen=$(env "$@" timeout 60 env/bin/python probe.py 2>&1) || true
  echo "$text: $seen"
  # shellcheck disable=SC2053
  [[ $seen == $pattern ]] || changed=1
}
LD_LIBRARY_PATH=$folders env/bin/python -c 'import ctypes; ctypes.CDLL("libmpich.so.12")' 2>/dev/null ||
  skip "the unpacked libmpich.so.12 cannot be loaded: it depends on packages beyond ${packages[*]}"
if LD_LIBRARY_PATH= env/bin/python -c 'import ctypes; ctypes.CDLL("libmpi.so.12")' 2>/dev/null ||
  LD_LIBRARY_PATH= env/bin/python -c 'import ctypes; ctypes.CDLL("libmpi.so.40")' 2>/dev/null; then
  skip "another MPI is installed on this machine and would be loaded"
fi
show "as installed" "RuntimeError: cannot load MPI library*" LD_LIBRARY_PATH="$folders"
show "with MPI4PY_LIBMPI=libmpich.so.12" "ImportError: libmpi.so.12: cannot open*" \
  LD_LIBRARY_PATH="$folders" MPI4PY_LIBMPI=libmpich.so.12
show "with a link libmpi.so.12" "MPICH Version:*" LD_LIBRARY_PATH="$work/link:$folders"
[ "$changed" = 0 ] || { echo "changed: the library is no longer searched for as described"; exit 1; }
