"""The `marrow` command."""


def main() -> None:
    """Run the command line."""
