"""One training run a process: the product and its peers, each told by a job in JSON what to do."""
