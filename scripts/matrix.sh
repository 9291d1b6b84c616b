#!/bin/sh
# Run the test suite on each supported Python that is here, with the oldest and the newest pyarrow.
# Arguments go to pytest. A Python that is not here is named, and is no failure; PyMC's own range,
# one release at present, is that of the wheel.
set -u
cd "$(dirname "$0")/.."

failed=
for version in 3.12 3.13 3.14; do
    if ! python=$(scripts/find-python.sh $version 2>/dev/null); then
        summary="${summary-}$version: not found here
"
        continue
    fi
    # The first pyarrow with wheels for 3.14 is 22.
    case $version in 3.14) oldest=22.0.0 ;; *) oldest=18.0.0 ;; esac
    for pyarrow in $oldest newest; do
        if make --no-print-directory test PYTHON="$python" VENV=".venv-$version-$pyarrow" \
            PYARROW="$pyarrow" ${1+PYTEST_ARGS="$*"}; then
            result=passed
        else
            result=FAILED failed=yes
        fi
        summary="${summary-}$version with pyarrow $pyarrow: $result
"
    done
done
printf '\n%s' "$summary"
[ -z "$failed" ]
