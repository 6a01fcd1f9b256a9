"""The floor: what this kernel asks for the steps of a live snapshot, measured without any VM.

`floor.c` times the steps, `build` compiles it, `plan` says what is measured, `program` runs one
block, `measure` records rounds of them into a run set, and `summary` condenses such a set.
"""
