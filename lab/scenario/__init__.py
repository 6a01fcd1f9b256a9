"""What is measured: the machine, the workload in it, the method that takes the snapshot, the
storage that it goes to, and the instruments that watch it.

Each of its classes is the only place where its parameters are spelled.  The command line's flags
(`flags`), the JSON of run files and sidecars (`document`) and the dimension columns of tables
(`dimensions`) are all derived from the fields, so a parameter cannot exist in
one of them and be missing in another.

A field's metadata holds `help` (its command line help) and, where the bare name would be
ambiguous in a table or on a command line, `dimension`: `Workload.kind` is the dimension
`workload` and the flag `--workload`.  `earlier` is what was the case before there was the field,
where that is not its default: a recording that does not name it is read so.

Tables and figures use `unit`, `title` (what an axis is called), `doc` (what a recorded value means,
where that is not what the flag asks for) and `zero` (what 0 stands for, where it is not a number).
`DIMENSIONS` has all of it, as one record for each parameter.

A `plan` measures scenarios; `command` is its command line, and `campaigns` are plans with names.
"""
