"""Change the model: put quantizers in, choose them, learn them, take them out."""
