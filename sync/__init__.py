"""fp8rl.sync."""
