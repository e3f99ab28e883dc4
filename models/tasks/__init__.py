"""One file for each task: prepare, run, interpret."""
