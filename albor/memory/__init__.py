"""What a run allocates: the plan, the devices it is held against, and the arena that allocates it."""
