"""Training: the recipe, and supervised fine-tuning by it."""
