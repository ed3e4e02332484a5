#!/usr/bin/env bash
# Makes .venv with the exact pins of requirements-cpu.txt and this checkout installed in it. Does nothing when that is done already.
# torch's CPU build is taken from where pip is told to look (find-links) if it is there, else from PyTorch's CPU index.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version) is too old; install Python 3.11 or newer, or give its path: make PYTHON=/path/to/python3.11" >&2
    exit 1
}
stamp="$venv/.bregman-$(cat requirements-cpu.txt pyproject.toml .ci/setup.sh | sha256sum | cut -c1-16)"
[ -e "$stamp" ] && exit 0

echo "setup: making $venv (a minute; torch and vLLM are large)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9

# uv does not read pip's configuration: hand on where pip looks for wheels and which index it uses.
options=()
while IFS= read -r link; do options+=(--find-links "$link"); done < <(
    "$venv/bin/python" -m pip config list | sed -n "s/^[^=]*find-links='\(.*\)'$/\1/p" | sed 's/\\n/ /g' | tr ' ' '\n' | sed '/^$/d' | sort -u
)
index=$("$venv/bin/python" -m pip config list | sed -n "s/^[^=]*[.]index-url='\(.*\)'$/\1/p" | tail -n 1)
[ -z "$index" ] || options+=(--default-index "$index")

uv() { env -u VIRTUAL_ENV "$venv/bin/uv" "$@"; }
if ! uv pip install --quiet --python "$venv/bin/python" --dry-run --no-index --no-deps "${options[@]}" "torch==2.13.0+cpu" 2>/dev/null; then
    options+=(--torch-backend cpu)
fi
uv pip install --quiet --python "$venv/bin/python" --no-deps --compile-bytecode "${options[@]}" -r requirements-cpu.txt
uv pip install --quiet --python "$venv/bin/python" --no-deps "${options[@]}" --editable .
rm -f "$venv"/.bregman-*
touch "$stamp"
