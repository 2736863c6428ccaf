"""`albor sweep`: many runs of one configuration with some keys varied, and which values were best."""
