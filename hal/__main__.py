"""``python -m hal`` is the command ``hal``."""

from hal.cli.app import main

if __name__ == "__main__":
    main()
