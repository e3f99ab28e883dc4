"""The admin's program: one file for each command."""
