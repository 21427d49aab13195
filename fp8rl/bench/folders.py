"""The folder that a benchmark writes to."""

from __future__ import annotations

from pathlib import Path

import typer


def make(folder: Path) -> None:
    """Make the folder before anything is measured, and refuse to overwrite a result."""
    if (folder / "result.json").exists():
        typer.echo(f"fp8rl: {folder} holds a result already; choose another --out", err=True)
        raise typer.Exit(2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        typer.echo(f"fp8rl: {folder} cannot be made: {error}", err=True)
        raise typer.Exit(2) from error
