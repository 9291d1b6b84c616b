#!/bin/sh
# Print the Python to make the environment with: 3.13 if there is one, else 3.12, else 3.14.
# Candidates are run, not only found: the shims of a version manager may exist and fail.
# With an argument, that is the only candidate; or, if it is a version such as 3.14, only such ones.
set -u
wanted=${1-}
version='3\.1[234]'
case $wanted in
    3.1[234]) version=$(echo "$wanted" | sed 's/\./\\./') wanted= ;;
esac

probe='
import sys, sysconfig, ensurepip, venv
assert not sysconfig.get_config_var("Py_GIL_DISABLED")
print("%d.%d" % sys.version_info[:2], sys.executable)
'

candidates() {
    if [ -n "$wanted" ]; then
        command -v "$wanted"
        return
    fi
    echo "$PATH" | tr ':' '\n' | while read -r directory; do
        for name in python3.13 python3.12 python3.14 python3 python; do
            echo "$directory/$name"
        done
    done
    printf '%s\n' "${PYENV_ROOT:-${HOME-}/.pyenv}"/versions/*/bin/python
    printf '%s\n' "$(uv python dir 2>/dev/null)"/*/bin/python3
}

run_candidates() {
    candidates | while read -r candidate; do
        [ -x "$candidate" ] && "$candidate" -c "$probe" </dev/null 2>/dev/null
    done
}

best=$(run_candidates |
    grep "^$version " |
    sed -n 's/^3\.13 /1 /p; s/^3\.12 /2 /p; s/^3\.14 /3 /p' |
    sort -s -k 1,1 | head -n 1 | cut -d ' ' -f 2-)

if [ -n "$best" ]; then
    echo "$best"
    exit
fi
{
    if [ -n "$wanted" ]; then
        echo "PYTHON=$wanted does not run as Python 3.12 to 3.14 with the venv module"
    else
        echo "Found no Python 3.12 to 3.14 with the venv module"
    fi
    echo "Install one, for example:"
    echo "  Debian, Ubuntu   apt install python3 python3-venv   (Debian 13, Ubuntu 24.04 or later)"
    echo "  Fedora           dnf install python3.13"
    echo "  macOS            brew install python@3.13"
    echo "  uv               uv python install 3.13"
    echo "  pyenv            pyenv install 3.13"
    echo "or name one: make test PYTHON=/path/to/python3.13"
} >&2
exit 1
