"""Who may join, what may run, and which device runs what: the fleet's signatures."""
