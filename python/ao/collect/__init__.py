"""`ao collect`: run a target over contexts once, and keep the activations that somebody wants."""
