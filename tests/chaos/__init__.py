"""Random faults against a whole service of real processes with a toy trainer; and a judge of what came of it."""
