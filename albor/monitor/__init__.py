"""`albor monitor`: a run in progress, seen from another terminal. It only reads the run directory.

`history` keeps what has been read, `view` makes of it what there is to see (pure: no file, no clock, no
terminal), `panels` and `chart` make text of that, and `snapshot` and `app` show it, once or as it changes.
`attach` finds the run and reads it.
"""
