"""fp8rl inside other trainers: veRL (`verl/`), TRL (`trl.py`) and slime (`slime.py`).

Nothing else imports these.
"""
