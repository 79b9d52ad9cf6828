"""Step, loop, callbacks, stages."""
