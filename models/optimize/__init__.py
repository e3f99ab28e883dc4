"""What is done to a model before it is published: weights laid out to be mapped, smaller and faster variants."""
