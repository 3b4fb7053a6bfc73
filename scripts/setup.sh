#!/bin/sh
# Install Prestage with some of its extras into .venv, editable.
# Usage: setup.sh EXTRAS, a comma-separated list of the extras in pyproject.toml.
# Nothing happens if the same has been installed with the same requirements.

set -eu

cd "$(dirname "$0")/.."
extras=$1
hash=$(cat pyproject.toml requirements/tested.txt | sha256sum | cut -c 1-16)
stamp=.venv/prestage-$(echo "$extras" | tr ',' '-')-$hash

[ ! -x .venv/bin/python ] || export PYTHON=.venv/bin/python
python=$(scripts/check-tools.sh "$extras")
if [ -e "$stamp" ]; then
    exit 0
fi
if [ ! -x .venv/bin/python ]; then
    echo "Creating .venv"
    "$python" -m venv .venv
fi
echo "Installing prestage[$extras] into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint requirements/tested.txt --editable ".[$extras]"
touch "$stamp"
