"""fp8rl inside other trainers: veRL (`verl/`) and TRL (`trl.py`). Nothing else imports these."""
