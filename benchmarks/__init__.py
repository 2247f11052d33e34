"""Numbers: each module measures one thing over several runs and prints medians, CPU time beside wall time."""
