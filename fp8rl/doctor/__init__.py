"""``fp8rl doctor``: what this machine can do, and how a run's KV scales did."""
