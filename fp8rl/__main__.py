"""``python -m fp8rl``: the same as the ``fp8rl`` command."""

from fp8rl.cli import main

main()
