"""Methods that carry a state of their own from step to step."""
