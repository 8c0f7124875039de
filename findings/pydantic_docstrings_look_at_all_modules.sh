#!/usr/bin/env bash
# A model of Pydantic with attribute docstrings looks at the file of every module that is loaded, once for the first class.
#
# Versions:  pydantic 2.14.4, numpy 2.4.6; Python 3.11.
# Behaviour: With `use_attribute_docstrings=True` (off by default), the first class that is defined asks `inspect` for
#            its source, which compares the real path of the files of all loaded modules: an lstat for each part of
#            each path. In a program that has loaded scientific libraries these are thousands of operations, on a
#            cluster all of them on a shared file system, from every rank at the same time. The same class without the
#            option makes none. Descriptions given by `Field(description=...)` cost nothing, and so do docstrings that
#            are read when a program asks for them, e.g. for its help.
# Seen:      lstat calls while one model of one field is defined: 0 without the option, 2504 with it
#            thousands with the option: yes
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env || skip "python3 cannot make a virtual environment"
timeout 300 env/bin/pip -qq install pydantic==2.14.4 numpy==2.4.6 || skip "the packages cannot be installed"

cat >models.py <<'PY'
import os
import sys

import numpy.testing
from pydantic import BaseModel, ConfigDict

count = 0
lstat = os.lstat


def counting(*arguments, **options):
    global count
    count += 1
    return lstat(*arguments, **options)


os.lstat = counting


class Model(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=sys.argv[1] == "with")
    rate: float = 0.1
    """Of learning."""


print(count)
PY
without=$(env/bin/python models.py without)
with=$(env/bin/python models.py with)
echo "lstat calls while one model of one field is defined: $without without the option, $with with it"
[ "$without" -eq 0 ] && [ "$with" -gt 1000 ] || {
  echo "changed: a model with the option makes $with calls, one without it $without"
  exit 1
}
echo "thousands with the option: yes"
