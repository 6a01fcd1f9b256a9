#!/bin/sh
# The one set-up routine behind `make reproduce`, `make test` and `make lab`.
#
#   sh lab/bootstrap.sh [--packages-optional]
#
# Installs missing Debian packages (as root; otherwise prints the command and exits 2), creates
# .venv/ in the checkout and installs the lab into it. Quick when nothing is missing. Everything it
# says goes to stderr.
#
# With --packages-optional missing packages are named but are no reason to stop: recorded notebooks
# need Python alone.
#
# LAB_PYTHON names the interpreter to use when the default choice is not wanted.

set -eu

say() { printf '%s\n' "lab set-up: $*" >&2; }
fail() { printf '%s\n' "lab: error: $*" >&2; exit 2; }

packages_optional=no
for argument in "$@"; do
    case $argument in
        --packages-optional) packages_optional=yes ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail "unknown argument $argument; see sh lab/bootstrap.sh --help" ;;
    esac
done

here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$here/.venv
stamp=$venv/lab-stamp

# --- Debian packages -------------------------------------------------------------------------

missing_packages() {
    wanted=$(sed -e 's/#.*//' "$here/lab/debian-packages.txt")
    # dpkg-query fails when any name is unknown to it, which is what is being asked.
    # shellcheck disable=SC2086 # the list is words
    present=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' $wanted 2>/dev/null |
        sed -n 's/^installed //p') || true
    for package in $wanted; do
        case "
$present
" in
            *"
$package
"*) ;;
            *) printf '%s ' "$package" ;;
        esac
    done
}

install_packages() {
    # shellcheck disable=SC2086 # the list is words
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $1 >&2
}

if command -v dpkg-query >/dev/null 2>&1; then
    missing=$(missing_packages)
    if [ -n "$missing" ]; then
        command="apt-get install --no-install-recommends ${missing% }"
        if [ "$(id -u)" = 0 ]; then
            say "installing ${missing% }"
            set -- /var/lib/apt/lists/*_Packages*
            if [ ! -e "$1" ]; then
                apt-get update >&2
            fi
            # Package lists may be older than the archive; refresh them before giving up.
            install_packages "$missing" || { apt-get update >&2 && install_packages "$missing"; } ||
                fail "packages could not be installed: ${missing% }; run: $command"
        elif [ "$packages_optional" = yes ]; then
            say "to build and run guests, first run: sudo $command"
        else
            fail "Debian packages are missing; run: sudo $command"
        fi
    fi
else
    say "not a Debian system: the equivalents of lab/debian-packages.txt are expected"
fi

# --- Python ----------------------------------------------------------------------------------

usable() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! { [ -x "$venv/bin/python" ] && usable "$venv/bin/python"; }; then
    python=
    for candidate in ${LAB_PYTHON:-python3 /usr/bin/python3 python3.13 python3.12 python3.11}; do
        if usable "$candidate" && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] ||
        fail "no Python 3.11 or newer with venv was found; install python3-venv or set LAB_PYTHON"
    say "creating $venv with $("$python" -V)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

current=$(sha256sum "$here/pyproject.toml" | cut -d' ' -f1)\ $("$venv/bin/python" -VV)\ $here
if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$current" ]; then
    say "installing the lab and its requirements into $venv"
    rm -f "$stamp"
    (cd "$here" && "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        -e '.[notebooks,dev]') >&2
    printf '%s\n' "$current" >"$stamp"
fi
