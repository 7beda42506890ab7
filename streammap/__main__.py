"""python -m streammap."""

from streammap.cli.main import main

main(prog_name="streammap")
