#!/usr/bin/env bash
# Installs slide2vec from a checkout into a virtual environment of its own, with the locked packages. Both
# container recipes call it; it also serves on a machine without containers.
#
#     tools/containers/install.sh PREFIX [EXTRA,EXTRA…]
#
# Nothing of the checkout is needed afterwards. UV_* and PIP_* variables (indexes, caches, offline) are honoured.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
prefix=$1
extras=${2:-}
source=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "slide2vec needs Python 3.11 or newer; $python is $("$python" --version)" >&2; exit 1; }
[ ! -e "$prefix" ] || [ -x "$prefix/bin/python" ] ||
  { echo "$prefix is there already, and is no virtual environment" >&2; exit 1; }

"$python" -m venv "$prefix"
installer=$(mktemp -d)
trap 'rm -rf "$installer"' EXIT
"$python" -m venv "$installer"
"$installer/bin/python" -m pip install --quiet --disable-pip-version-check uv

arguments=(--frozen --no-dev --no-editable)
for extra in ${extras//,/ }; do arguments+=(--extra "$extra"); done
UV_PROJECT_ENVIRONMENT=$prefix "$installer/bin/uv" sync --quiet --project "$source" "${arguments[@]}"
"$prefix/bin/slide2vec" --version
