"""python -m streammap."""

from streammap.cli import main

main(prog_name="streammap")
