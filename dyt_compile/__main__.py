"""`python -m dyt_compile`: the same as the command dyt-compile."""

from .cli import main

main()
