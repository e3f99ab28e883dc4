"""The daemon that runs on a box."""
