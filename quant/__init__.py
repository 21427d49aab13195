"""fp8rl.quant."""
