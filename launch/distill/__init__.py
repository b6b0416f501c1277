"""``steppe distill``: a student learns from a teacher."""
