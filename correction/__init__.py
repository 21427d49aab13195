"""fp8rl.correction."""
