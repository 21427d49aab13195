"""The drift watch: engine and trainer compared layer by layer on a probe."""
