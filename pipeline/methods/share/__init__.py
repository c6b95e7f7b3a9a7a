"""Methods that let weights serve in several places."""
