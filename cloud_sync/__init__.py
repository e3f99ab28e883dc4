"""Everything that crosses between a box and the cloud."""
