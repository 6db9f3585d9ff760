"""``python -m app.cli``: how a process starts another of itself."""

from app.cli import main

main(prog_name="sluice")
