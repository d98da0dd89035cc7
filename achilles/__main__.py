"""``python -m achilles`` is the command ``achilles``."""

from achilles.cli import main

if __name__ == "__main__":
    main(prog_name="achilles")
