#!/bin/sh
# Check that the tools of the system are there and print the Python to use.
# Usage: check-tools.sh [EXTRAS], a comma-separated list of the extras that are to be installed.
# Where something is missing, print the command that installs it and fail.

set -u

missing=""

need() { # PROGRAM PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}

need git git
need make make
need g++ g++

# Verilator's front end is a Perl script that uses modules beyond Debian's perl-base.
perl -MPod::Usage -MGetopt::Long -e 1 >/dev/null 2>&1 || missing="$missing perl"

python=""
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done

if [ -z "$python" ]; then
    if command -v python3 >/dev/null 2>&1; then
        missing="$missing python3.11 python3.11-venv" # python3 is there but too old.
    else
        missing="$missing python3 python3-venv"
    fi
else
    # Debian splits venv off, and shows it only by leaving out ensurepip.
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing $python-venv"
    case ",${1:-}," in
    *,test,* | *,lint,*)
        # cocotb starts Python inside the simulator, for which Debian's python3 alone has no library.
        library=$("$python" - <<'PYTHON'
import os
import sys
import sysconfig

name = sysconfig.get_config_var("INSTSONAME") or ""
if not os.path.exists(os.path.join(sysconfig.get_config_var("LIBDIR") or "", name)):
    print("libpython%d.%d" % sys.version_info[:2])
PYTHON
        )
        [ -z "$library" ] || missing="$missing $library"
        ;;
    esac
fi

if [ -n "$missing" ]; then
    sudo="sudo "
    [ "$(id -u 2>/dev/null)" = 0 ] && sudo=""
    echo "Missing:$missing" >&2
    echo "Install with: ${sudo}apt-get install$missing" >&2
    exit 1
fi

echo "$python"
