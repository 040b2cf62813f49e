"""Real trainings of the embedded model, each one command, with the figures that say whether it worked."""
