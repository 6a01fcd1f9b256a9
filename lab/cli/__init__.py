"""The commands of ``lab``, one module each.

A command module has ``register(subparsers)``, which adds its parser and sets ``handler`` to a
function ``(args) -> int`` or ``async (args) -> int``. Modules import what is heavy inside the
handler, so that ``lab --help`` is quick.
"""
