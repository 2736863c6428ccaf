"""What `albor bench` does: what this machine can do at best, and how near albor and its peers come to that.

`cases` says what is trained, `workload` writes the weights and tokens that all systems start from, `peers`
are the systems, each run in a process of its own (`peer`), `calibrate` times the operations that a step is
made of and `albor.floor` adds them up, `run` keeps the order of it all, and `report` writes what came out.
"""
