"""What a model is and how one answers; imports nothing else of Spillway."""
