"""``python -m kifmerge``: the same as the ``kifmerge`` command."""

from kifmerge.cli import main

if __name__ == "__main__":
    main()
