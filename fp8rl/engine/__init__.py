"""The rollout engine: ``rollout.py`` is held by the trainer, ``process.py`` runs vLLM."""
