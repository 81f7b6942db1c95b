"""`python -m marrow` is the `marrow` command."""

from marrow.cli.main import main

if __name__ == "__main__":
    main()
