"""``steppe blackbox``: prompts from forward passes alone."""
