"""`albor calibrate`: measures what a run takes beside its arena here, for `albor vram-estimate`."""
