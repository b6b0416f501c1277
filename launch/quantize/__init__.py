"""``steppe quantize``: a float model as integers, by several methods side by side."""
