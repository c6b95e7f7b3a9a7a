"""Knowledge distillation: a small student learns from a fine-tuned teacher (the survey's column of that name)."""
