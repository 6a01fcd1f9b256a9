#!/bin/sh
# msgspec writes a NaN as JSON null, and the same class then refuses to read it.
#
# One would guess: what msgspec.json encodes from a typed Struct, it decodes into that Struct; a
#   float that JSON cannot hold is refused when it is written, as with json's allow_nan=False.
# What is so: NaN and both infinities become null without a word.  Reading that back as `float`
#   is a ValidationError; read as `float | None` the three can no longer be told apart.
# Seen with: msgspec 0.23.0, Python 3.11.
# Output seen: nan: {"fault_us":null}, then Expected `float`, got `null` - at `$.fault_us`
#              (the same for inf and -inf); msgpack: all three come back as they were
# Why it matters: a run's record is written once and read by others.  It is found unreadable when
#   the measurement is long over.  Give such fields the type `float | None`, and refuse what is
#   not finite before it is written; or use MessagePack.
#
# Needs: Python 3.11 or later with venv, and the network for pip.

set -eu
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m pip install -q --target "$work/packages" msgspec==0.23.0 2> "$work/pip" \
    || { cat "$work/pip" >&2; exit 1; }

PYTHONPATH="$work/packages" python3 - << 'END'
import sys

import msgspec


class Run(msgspec.Struct):
    fault_us: float


print("msgspec", msgspec.__version__)
right = True
for value in (float("nan"), float("inf"), float("-inf")):
    text = msgspec.json.encode(Run(value))
    try:
        read = str(msgspec.json.decode(text, type=Run))
    except msgspec.ValidationError as error:
        read = str(error)
    print(f"{value}: {text.decode()}, then {read}")
    right &= text == b'{"fault_us":null}' and read.startswith("Expected `float`, got `null`")
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(Run(value)), type=Run)
    right &= str(packed.fault_us) == str(value)
print("msgpack: all three come back as they were" if right else "changed")
sys.exit(not right)
END
